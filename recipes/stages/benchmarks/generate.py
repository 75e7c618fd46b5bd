"""Questions that a model answers in its own words, and scorers of the answers: the rules that rewards are made of."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from recipes.fields import meaning, refuse
from recipes.problem_codes import Code
from recipes.smoke_sizes import RESPONSE_TOKENS
from recipes.stages.answers import Template
from recipes.stages.benchmarks.case import Asked, Case, Named, Option, Row, UnfitRow, column
from recipes.stages.rewards.outside import ModelTerm
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.union import RewardTerm, TermName, carried_columns

PLACE = re.compile(r"\{(\w+)\}")


class Generate(Asked):
    """Answers that a model writes, and what scorers give them: each the mean of its values."""

    by_choice: ClassVar[bool] = False

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
    template: Template = meaning(
        "none", description="chat: the prompt, examples included, is the user's turn of the model's chat template."
    )
    max_new_tokens: int = meaning(128, ge=1, le=10**6, description="Longest answer.")
    temperature: float = meaning(0.0, ge=0, le=100, description="0: the likeliest token each time; above: drawn.")
    stop: list[str] = meaning(
        default_factory=list, max_length=16, description="Texts that end an answer; what follows is not scored."
    )

    @model_validator(mode="after")
    def _judged_by_text(self) -> "Generate":
        for name, term in self.scorers.items():
            if isinstance(term, ModelTerm):
                refuse(Code.NOT_APPLICABLE, f"scorers.{name} is a reward model, which the stage's `rewards` takes")
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

    @property
    def surroundings(self) -> str:
        return self.template

    @property
    def writes(self) -> int:
        return self.max_new_tokens

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

    def cut(self, text: str) -> str:
        """An answer up to the first text that ends it."""
        ends = [place for mark in self.stop if (place := text.find(mark)) >= 0]
        return text[: min(ends, default=len(text))].strip()

    def reading(self) -> dict[str, Any]:
        """Settings that decide what its cases are."""
        return {"suite": self.suite, "prompt": self.prompt, "answer": self.answer}

    def shrunk(self) -> Self:
        return super().shrunk().changed(max_new_tokens=min(self.max_new_tokens, RESPONSE_TOKENS))


def _filled(text: str, row: Row) -> str:
    return PLACE.sub(lambda found: str(column(row, found[1])), text)
