"""Problems whose solutions are programs: a model writes them, and tests say whether they are right."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import comb
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from recipes.fields import meaning, placement, refuse
from recipes.problem_codes import Code
from recipes.stages.benchmarks.case import Case, Named, Option, UnfitRow, text_column
from recipes.stages.benchmarks.written import Written
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.unit_tests import SandboxLimits, UnitTests

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a solution that continues its prompt, as Chen et al. (2021) have it."""
COLUMNS = ("prompt", "test", "entry_point")


def pass_at(k: int, draws: int, passed: int) -> float:
    """The chance that one of k draws passes, without bias from so many draws (Chen et al. 2021, equation 1)."""
    return 1 - comb(draws - passed, k) / comb(draws, k)


class CodeProblems(Written):
    """Programs that a model writes, run with their tests in a sandbox: `pass_at_K`, the chance that one of K passes."""

    suite: Literal["code"] = meaning(description="The model writes programs, which tests judge.")
    layout: Literal["human_eval"] = meaning(
        "human_eval", description="human_eval: {prompt, test, entry_point}, and canonical_solution where there is one."
    )
    samples: int = meaning(1, ge=1, le=1000, description="Programs for each problem.")
    k: list[Annotated[int, Field(ge=1, le=1000)]] = meaning(
        default_factory=lambda: [1], min_length=1, max_length=16, description="Which pass_at_K are measured."
    )
    limits: SandboxLimits = meaning(default_factory=SandboxLimits, description="What the tests of a program may use.")
    parallel: int = placement(2, ge=1, le=256, description="Sandboxes at a time on each rank.")

    @model_validator(mode="after")
    def _enough_draws(self) -> "CodeProblems":
        for k in self.k:
            if k > self.samples:
                refuse(Code.OUT_OF_RANGE, f"k holds {k}, which is more than samples ({self.samples})")
        if len(set(self.k)) < len(self.k):
            refuse(Code.DUPLICATE_ITEM, f"k lists a number twice: {self.k}")
        if self.samples > 1 and self.temperature == 0:
            refuse(Code.NO_EFFECT, f"samples ({self.samples}) are all the same with temperature 0: give one above 0")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"pass_at_{k}" for k in self.k)

    @property
    def terms(self) -> Mapping[str, Term]:
        return {"passed": UnitTests(rule="unit_tests", tests="test", before="prompt", entry_point="entry_point",
                                    score="all", limits=self.limits, parallel=self.parallel)}  # fmt: skip

    @property
    def carried(self) -> tuple[str, ...]:
        return COLUMNS

    @property
    def draws(self) -> int:
        return self.samples

    def cases(self, rows: Iterable[Named]) -> Iterator[tuple[int, Case]]:
        for place, (name, row) in enumerate(rows):
            try:
                prompt, _, _ = (text_column(row, each) for each in COLUMNS)
            except UnfitRow as error:
                raise UnfitRow(f"{name}: {error}") from None
            yield place, Case((Option(prompt, str(row.get("canonical_solution") or "")),), (0,))

    def shown(self, row: Named) -> tuple[str, str]:
        ((_, case),) = self.cases([row])
        return case.asked(self.preface).best

    def cut(self, text: str) -> str:
        """A program up to the first text that ends it, with the indentation of its first line."""
        marks = self.stop or (STOP if self.template == "none" else ())
        ends = [place for mark in marks if (place := text.find(mark)) >= 0]
        return text[: min(ends, default=len(text))].rstrip()

    def judged_draws(self, by_term: Mapping[str, Sequence[float]]) -> dict[str, float]:
        passed = by_term["passed"]
        return {f"pass_at_{k}": pass_at(k, len(passed), int(sum(passed))) for k in self.k}

    def reading(self) -> dict[str, Any]:
        """Settings that decide what its cases are."""
        return {"suite": self.suite, "layout": self.layout}

    def shrunk(self) -> Self:
        few = min(self.samples, max(self.k))
        return super().shrunk().changed(samples=few)
