"""What every benchmark answers: its rows as cases, and what a model's answer to a case is worth."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from pydantic import model_validator

from recipes.data.text import Source
from recipes.fields import Strict, meaning, refuse
from recipes.problem_codes import Code
from recipes.smoke_sizes import ROWS, SEQUENCE
from recipes.stages.answers import SourceUse, held_out_use
from recipes.stages.rewards.term import Term

Row = Mapping[str, Any]
"""The columns of a row as its file has them."""
Named = tuple[str, Row]
"""A row after its file and number, for example `arc.jsonl:17`."""


class UnfitRow(ValueError):  # noqa: N818
    """Says what is wrong with a row for its layout."""


class Likelihood(NamedTuple):
    """Of a text after its context."""

    nats: float
    is_greedy: bool
    """Whether each token is the likeliest one at its place."""


@dataclass(frozen=True, slots=True)
class Option:
    """A text whose likelihood is taken, after a context."""

    context: str
    text: str
    """With the space that divides it from the context."""

    @property
    def characters(self) -> int:
        """Its length without that space."""
        return len(self.text.removeprefix(" "))


@dataclass(frozen=True, slots=True)
class Case:
    """One row, or some rows that belong together, as it is put to a model."""

    options: tuple[Option, ...]
    """Of a question with choices each of them; of one to be answered freely its true answer."""
    right: tuple[int, ...] = ()
    """Places of the true options, the best first; (): none is true."""
    group: str = ""
    """A subject or a kind of bias, by which figures are given as well."""

    @property
    def best(self) -> tuple[str, str]:
        """A question and its best answer."""
        best = self.options[self.right[0] if self.right else 0]
        return best.context, best.text

    def asked(self, before: str, after: str = "") -> "Case":
        """The case with text around each context."""
        options = tuple(Option(before + option.context + after, option.text) for option in self.options)
        return Case(options, self.right, self.group)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        options = [[option.context, option.text] for option in self.options]
        return {"options": options, "right": list(self.right), "group": self.group}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Case":
        """What `to_json` gave."""
        options = tuple(Option(*option) for option in value["options"])
        return Case(options, tuple(value["right"]), value["group"])


SHOT_END = "\n\n"
"""Between the examples before a question."""


class Benchmark(Strict):
    """Rows with known answers, of which every figure comes with its number of rows and a 95 % interval."""

    data: Source = meaning(
        description="Its rows, in their published columns; with hold_out those that it keeps away from training."
    )
    max_tokens: int = meaning(
        1024,
        ge=8,
        le=10**7,
        description="Most tokens of a case, examples and answer included; longer ones are left out and counted.",
    )

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of its figures, each with an interval."""

    @property
    def judged(self) -> tuple[str, ...]:
        """Those of them of which more is better."""
        return self.metrics

    @property
    def references(self) -> tuple[str, ...]:
        """Names of figures to compare these with, which have no interval."""
        return ()

    @property
    def num_shots(self) -> int:
        """Examples before each question."""
        return 0

    @abstractmethod
    def cases(self, rows: Iterable[Named]) -> Iterable[tuple[int, Case | None]]:
        """Cases by the place of their first row, in the order of the rows; None: what belongs with it is not there.

        Raises UnfitRow, which names the row.
        """

    @abstractmethod
    def shown(self, row: Named) -> tuple[str, str]:
        """What a model reads of a row, and what it is to say; raises UnfitRow."""

    @property
    def terms(self) -> Mapping[str, Term]:
        """What scores written answers, by name."""
        return {}

    @property
    def carried(self) -> tuple[str, ...]:
        """Columns of the rows that go with the cases to what scores an answer."""
        return ()

    @property
    def surroundings(self) -> str:
        """What is around a case when a model reads it."""
        return ""

    @property
    def writes(self) -> int:
        """Most tokens of an answer; 0: none is written."""
        return 0

    @property
    def draws(self) -> int:
        """Answers to each question, where they are written."""
        return 1

    def values(self, found: Sequence[Likelihood], case: Case) -> dict[str, float]:
        """Each figure that a case counts in, by what was found of its options; not where answers are written."""
        raise NotImplementedError

    def picked(self, logprobs: Sequence[float], case: Case) -> str:
        """What the model holds for the likeliest, for the report's samples."""
        return case.options[likeliest(logprobs)].text.strip()

    def reading(self) -> dict[str, Any]:
        """Settings that decide what its cases are."""
        return self.model_dump(mode="json", exclude={"data", "max_tokens"})

    def sources(self, place: str) -> list[SourceUse]:
        """The sources that it reads; `place` is where it stands in its stage."""
        return [replace(held_out_use(f"{place}.data", self.data, "cases"), carried=self.carried, form=self)]

    @property
    def beginning(self) -> str:
        """Text before everything else."""
        return ""

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(data=self.data.limited(ROWS), max_tokens=min(self.max_tokens, SEQUENCE))


class Asked(Benchmark):
    """Questions, before which answered ones may stand."""

    shots: int = meaning(
        0,
        ge=0,
        le=64,
        description="Answered questions before each one, drawn by the seed; of the same subject where rows have one.",
    )
    examples: Source | None = meaning(None, description="Where these are drawn from; null: the other rows of `data`.")
    preface: str = meaning("", description="Text before everything else, as lm-eval's `description`.")

    @model_validator(mode="after")
    def _examples_are_drawn(self) -> Self:
        if self.examples is not None and self.shots == 0:
            refuse(Code.NO_EFFECT, "examples has no effect without shots")
        return self

    @property
    def beginning(self) -> str:
        return self.preface

    @property
    def num_shots(self) -> int:
        return self.shots

    def sources(self, place: str) -> list[SourceUse]:
        uses = super().sources(place)
        if self.examples is not None:
            uses.append(replace(held_out_use(f"{place}.examples", self.examples, "cases"), form=self))
        return uses

    def reading(self) -> dict[str, Any]:
        own = super().reading()
        return {name: value for name, value in own.items() if name not in ("shots", "examples", "preface")}


def likeliest(values: Sequence[float]) -> int:
    """The place of the largest value, of equal ones the first."""
    return max(range(len(values)), key=lambda place: values[place])


def column(row: Row, name: str, *others: str) -> Any:
    """A column of a row under one of its names; raises UnfitRow."""
    for known in (name, *others):
        if row.get(known) is not None:
            return row[known]
    there = ", ".join(list(row)[:12]) or "none"
    raise UnfitRow(f"no column {' or '.join(repr(known) for known in (name, *others))}; columns there: {there}")


def text_column(row: Row, name: str, *others: str) -> str:
    """The same, of text."""
    found = column(row, name, *others)
    if not isinstance(found, str):
        raise UnfitRow(f"column {name!r} is {type(found).__name__}, not text")
    return found
