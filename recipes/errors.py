"""The one exception tree; every error carries the exit code that the command line ends with and survives pickling.

TrainwrightError (1)
├── RecipeError (2)     the recipe is wrong; `problems` lists everything that was found
├── RequestError (2)    the command asks for something that does not exist or is refused
├── CapacityError (3)   the cluster or the store cannot take the work
├── StageError (4)      a stage failed or a gate refused
│   └── VerificationError   files are not the live model that they were written from
├── StoreDamaged (5)    bytes in the store are not what their manifest says
└── Preempted (75)      stopped early with resumable state
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from recipes.problem_codes import Code


class Finding(NamedTuple):
    """One thing that is wrong, found by a rule that does not know the place in the recipe."""

    code: Code
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        return f"{self.message}; {self.suggestion}" if self.suggestion else self.message

    def in_file(self, path: Path) -> "Finding":
        """The finding about a file or a folder, which no key of the recipe fixes."""
        return self._replace(message=f"{path}: {self.message}", suggestion="")


class FieldFinding(NamedTuple):
    """A finding at a field of a stage: what `check` reports with its place, and a worker raises."""

    field_path: str
    """Relative to the stage, as `train.tokens`."""
    found: Any
    """The field's value; an empty text is not shown."""
    finding: Finding

    def __str__(self) -> str:
        return f"{self.field_path}: {self.finding}"


def at(field_path: str, found: Any, code: Code, message: str, suggestion: str = "") -> FieldFinding:
    """A finding at a field of a stage."""
    return FieldFinding(field_path, found, Finding(code, message, suggestion))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, its place, and what would be right."""

    code: Code
    file: str
    line: int | None
    field: str
    found: str
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        text = f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"
        if self.found:
            text += f" (found {self.found})"
        if self.suggestion:
            text += f"; {self.suggestion}"
        return f"{text} [{self.code}]"

    def to_json(self) -> dict[str, Any]:
        """The problem as a plain JSON object."""
        return asdict(self)


class TrainwrightError(Exception):
    """Root of every error that is shown to the user without a traceback."""

    exit_code: ClassVar[int] = 1
    codes: tuple[Code, ...] = ()
    """Of the rules that found it; empty where none did."""

    @classmethod
    def of(cls, *findings: Finding | FieldFinding) -> Self:
        """The error of what rules have found."""
        error = cls("; ".join(map(str, findings)))
        error.codes = tuple(found.code if isinstance(found, Finding) else found.finding.code for found in findings)
        return error


class RecipeError(TrainwrightError):
    """A recipe is wrong; `problems` holds every finding."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(list(problems))
        self.problems: list[Problem] = list(problems)
        self.codes = tuple(problem.code for problem in problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class RequestError(TrainwrightError):
    """The command asks for something that does not exist, or a resume is refused."""

    exit_code: ClassVar[int] = 2


class CapacityError(TrainwrightError):
    """The cluster or the store cannot take the work: workers, memory, disk, not writable."""

    exit_code: ClassVar[int] = 3


class StageError(TrainwrightError):
    """A stage failed or a gate refused its input."""

    exit_code: ClassVar[int] = 4


class VerificationError(StageError):
    """A stage's files, opened in a clean process, are not the model that was trained."""


class StoreDamaged(TrainwrightError):  # noqa: N818
    """Bytes in the store are missing or are not what their manifest says."""

    exit_code: ClassVar[int] = 5


class Preempted(TrainwrightError):  # noqa: N818
    """The work was stopped early and its state is saved; `resume` continues it."""

    exit_code: ClassVar[int] = 75


def raise_findings(findings: Iterable[FieldFinding], error: type[TrainwrightError] = RequestError) -> None:
    """Raise one error with everything that a stage's rules have found; nothing where they found nothing."""
    if found := tuple(findings):
        raise error.of(*found)
