"""A rule that runs tests of the code in a response, in a sandbox."""

import ast
import re
from dataclasses import dataclass
from typing import Literal

from recipes.fields import Strict, meaning, placement
from recipes.stages.rewards.term import Row, Term

FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def code_block(text: str) -> str | None:
    """A response's last fenced block of Python or of no language, also where it was cut off; None: it has none."""
    blocks = FENCED.findall(text)
    return blocks[-1] if blocks else None


class SandboxLimits(Strict):
    """What one test may use; past a limit it fails."""

    wall_s: float = meaning(5.0, gt=0, le=600, description="Seconds by the clock.")
    cpu_s: int = meaning(5, ge=1, le=600, description="Seconds of CPU time of a process.")
    memory_mib: int = meaning(
        256, ge=64, le=1 << 20, description="Memory in MiB of all its processes, and address space of each."
    )
    disk_mib: int = meaning(16, ge=1, le=1 << 16, description="MiB of files in /tmp, which are kept in memory.")
    processes: int = meaning(16, ge=4, le=4096, description="Processes and threads.")
    output_bytes: int = meaning(4096, ge=0, le=1 << 20, description="Bytes of its output that are read.")


@dataclass(frozen=True, slots=True)
class Attempt:
    """Code and its tests."""

    code: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tested:
    """What tests made of some code."""

    passed: tuple[bool, ...]
    """By test; none where the code passes a test that nothing can pass."""
    why: tuple[str, ...] = ()
    """Of each test: empty, `failed`, or the limit that it ran into, `wall` or `memory`."""
    said: tuple[str, ...] = ()
    """The first output of each test."""
    forged: bool = False
    """The code passed a test that nothing can pass."""


class UnitTests(Term):
    """The share of tests that the response's code passes: its last fenced block, run in a sandbox without network,
    files and other processes of the machine. Refused where the kernel lacks what the sandbox is made of.
    """

    rule: Literal["unit_tests"] = meaning(description="Tests of the response's Python code pass.")
    tests: str = meaning(
        "tests",
        min_length=1,
        description="The column of the prompt's row that holds the tests: a list of pieces of Python code, each of "
        "which passes when it ends without an exception, or one piece.",
    )
    before: str | None = meaning(
        None,
        min_length=1,
        description="The column with code that is run before the response's; null: none. With `entry_point` a response "
        "without a fenced block continues it where it ends.",
    )
    entry_point: str | None = meaning(
        None,
        min_length=1,
        description="The column with the name of a function that each test hands to its `check`, as HumanEval does; "
        "null: tests call what they test.",
    )
    score: Literal["share", "all"] = meaning("share", description="share: of tests that pass; all: 1 if all pass.")
    limits: SandboxLimits = meaning(default_factory=SandboxLimits, description="What one test may use.")
    parallel: int = placement(2, ge=1, le=256, description="Sandboxes at a time on each rank.")

    @property
    def carried(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.tests, self.before, self.entry_point)))

    def row_rule(self, row: Row) -> str:
        for column in filter(None, (self.before, self.entry_point)):
            if not isinstance(row[column], str):
                return f"column {column!r} is {type(row[column]).__name__}, not text"
        if self.entry_point is not None and not row[self.entry_point].isidentifier():
            return f"column {self.entry_point!r} is no name of a function: {row[self.entry_point][:80]!r}"
        found = row[self.tests]
        if isinstance(found, str):
            found = [found]
        if not isinstance(found, list) or not found or not all(isinstance(test, str) for test in found):
            return f"column {self.tests!r} is neither text nor a list of texts: {str(found)[:80]!r}"
        return next((wrong for place, test in enumerate(found) if (wrong := self._test_rule(place, test))), "")

    def _test_rule(self, place: int, test: str) -> str:
        try:
            ast.parse(test)
        except (SyntaxError, ValueError) as error:
            return f"column {self.tests!r}: test {place} is no Python: {error}"
        return ""

    def attempt(self, text: str, row: Row) -> Attempt:
        """A response's code with the tests of its row, which `row_rule` has let pass."""
        block = code_block(text)
        before = "" if self.before is None else row[self.before]
        between = "" if block is None and self.entry_point is not None else "\n"
        tests = [row[self.tests]] if isinstance(row[self.tests], str) else row[self.tests]
        call = "" if self.entry_point is None else f"\ncheck({row[self.entry_point]})\n"
        return Attempt(f"{before}{between}{text if block is None else block}", tuple(test + call for test in tests))

    def worth(self, found: Tested) -> float:
        """What a response is worth whose code did so."""
        return sum(found.passed) / len(found.passed) if self.score == "share" else float(all(found.passed))
