"""Questions that a model answers in its own words, and scorers of the answers: the rules that rewards are made of."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from recipes.fields import meaning, refuse
from recipes.problem_codes import Code
from recipes.stages.benchmarks.case import Case, Named, Option, Row, UnfitRow, column
from recipes.stages.benchmarks.written import Written
from recipes.stages.rewards.judge import GenerativeJudge
from recipes.stages.rewards.outside import ModelTerm
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.union import RewardTerm, TermName, carried_columns

PLACE = re.compile(r"\{(\w+)\}")


class Generate(Written):
    """Answers that a model writes, and what scorers give them: each the mean of its values."""

    suite: Literal["generate"] = meaning(description="The model writes an answer, which scorers judge.")
    prompt: str = meaning(
        min_length=1, description="What the model reads: text with columns of the row in braces, as {question}."
    )
    answer: str = meaning(
        " {answer}",
        description="The true answer in the same way, after each example and in the report; the scorers have their own "
        "column of it.",
    )
    scorers: dict[TermName, RewardTerm] = meaning(
        min_length=1,
        max_length=16,
        description="What answers are worth: rules as in `rewards` (exact, regex, number, math_verify, f1, chrf, bleu, "
        "...), or a function of yours.",
    )

    @model_validator(mode="after")
    def _judged_by_text(self) -> "Generate":
        for name, term in self.scorers.items():
            if isinstance(term, ModelTerm):
                refuse(Code.NOT_APPLICABLE, f"scorers.{name} is a reward model, which the stage's `rewards` takes")
            if isinstance(term, GenerativeJudge):
                refuse(Code.NOT_APPLICABLE, f"scorers.{name} is a judge, which the stage's `rewards` takes")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.scorers)

    @property
    def terms(self) -> Mapping[str, Term]:
        return self.scorers

    @property
    def carried(self) -> tuple[str, ...]:
        return carried_columns(self.scorers)

    def cases(self, rows: Iterable[Named]) -> Iterator[tuple[int, Case]]:
        for place, (name, row) in enumerate(rows):
            try:
                option = Option(_filled(self.prompt, row), _filled(self.answer, row))
            except UnfitRow as error:
                raise UnfitRow(f"{name}: {error}") from None
            yield place, Case((option,), (0,))

    def shown(self, row: Named) -> tuple[str, str]:
        ((_, case),) = self.cases([row])
        return case.asked(self.preface).best

    def reading(self) -> dict[str, Any]:
        """Settings that decide what its cases are."""
        return {"suite": self.suite, "prompt": self.prompt, "answer": self.answer}


def _filled(text: str, row: Row) -> str:
    return PLACE.sub(lambda found: str(column(row, found[1])), text)
