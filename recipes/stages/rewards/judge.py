"""A term whose values a language model gives: which of two answers is better, asked in both orders."""

import re
from typing import Literal

from pydantic import model_validator

from recipes.fields import meaning, placement, refuse
from recipes.problem_codes import Code
from recipes.stages.answers import Input
from recipes.stages.rewards.answers import WithAnswer
from recipes.stages.rewards.outside import Repeated

Choice = Literal["first", "second", "tie"]
URL = re.compile(r"^https?://[^\s/]+\S*$")
CRITERION = "Which answer is the better one: more helpful, correct and clear?"
ASKED = """{criterion}

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Reply with [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if neither is."""
"""As MT-Bench asks (Zheng et al. 2023, figure 5), without what it asks of style."""
_MARKED = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_BARE = re.compile(r"(?:answer\s+)?([abc]|tie)\W*", re.IGNORECASE)
_CHOICES: dict[str, Choice] = {"A": "first", "B": "second", "C": "tie", "TIE": "tie"}


def choice_of(said: str) -> Choice | None:
    """What a judge's answer means: its last mark, or a bare letter; None: neither is there."""
    if marks := _MARKED.findall(said):
        return _CHOICES[marks[-1]]
    bare = _BARE.fullmatch(said.strip())
    return None if bare is None else _CHOICES[bare[1].upper()]


class GenerativeJudge(Repeated, WithAnswer):
    """How often a language model prefers the response to the row's answer, asked in both orders: 1 it does, 0.5 a tie
    or opposite verdicts, 0 it does not. What it says that is no verdict does not count; without any it is a tie.

    A suite `comparison` has it compare models' answers with the first model's too.
    """

    judge: str = meaning(
        min_length=1,
        description="A language model: a stage, an address in the store, or the address of an OpenAI-compatible "
        "endpoint, as http://host:8000/v1.",
    )
    served_as: str | None = meaning(None, min_length=1, description="The endpoint's name of the model.")
    criterion: str = meaning(CRITERION, min_length=1, description="What it is asked, before the answers.")
    max_new_tokens: int = meaning(16, ge=1, le=10**5, description="Longest verdict; more for one that reasons first.")
    key_from: str | None = placement(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="The environment variable, on the workers, that holds the endpoint's key; null: it needs none.",
    )
    parallel: int = placement(8, ge=1, le=1000, description="Requests to the endpoint at a time.")

    @model_validator(mode="after")
    def _named_as_it_is_reached(self) -> "GenerativeJudge":
        if self.is_endpoint and self.served_as is None:
            refuse(Code.MISSING_KEY, f"judge is an endpoint ({self.judge}), which needs the model's name: served_as")
        for key in ("served_as", "key_from"):
            if not self.is_endpoint and getattr(self, key) is not None:
                refuse(Code.NO_EFFECT, f"{key} has no effect without an endpoint; judge is {self.judge!r}")
        return self

    @property
    def is_endpoint(self) -> bool:
        """Whether it is asked by HTTP."""
        return URL.match(self.judge) is not None

    @property
    def measures(self) -> tuple[str, ...]:
        return ("unparsed", "first_shown")

    def inputs(self, place: str) -> list[Input]:
        return [] if self.is_endpoint else [Input(f"{place}.judge", self.judge, ("model",))]

    def question(self, prompt: str, first: str, second: str) -> str:
        """What it is asked about two answers."""
        return ASKED.format(criterion=self.criterion, question=prompt, first=first, second=second)
