"""Rules on the words of a response."""

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from pydantic import Field

from recipes.fields import meaning
from recipes.stages.rewards.term import Row, Rule, Value

WORD = re.compile(r"[^\W\d_]+")


def words_of(text: str) -> list[str]:
    """Runs of letters, in lower case."""
    return [word.casefold() for word in WORD.findall(text)]


class RealWords(Rule):
    """The share of the response's words that are known; 0 without words."""

    rule: Literal["real_words"] = meaning(description="The share of words that are known.")
    words: list[Annotated[str, Field(min_length=1)]] = meaning(
        default_factory=list, description="The known words; none: those of the prompts and of their true answers."
    )

    def scorer(self, texts: Callable[[], Iterable[str]]) -> Value:
        known = frozenset(word for text in (self.words or texts()) for word in words_of(text))
        return lambda text, row: _known_share(text, known)

    def value(self, text: str, row: Row) -> float:
        return _known_share(text, frozenset(word for listed in self.words for word in words_of(listed)))


class Repetition(Rule):
    """The share of the response's runs of words that come for the first time: 1 repeats nothing; 0 without words."""

    rule: Literal["repetition"] = meaning(description="The share of runs of words that are not repeated.")
    run: int = meaning(3, ge=1, le=100, description="Words of a run.")

    def value(self, text: str, row: Row) -> float:
        words = words_of(text)
        runs = [tuple(words[at : at + self.run]) for at in range(max(1, len(words) - self.run + 1))]
        return len(set(runs)) / len(runs) if words else 0.0


def _known_share(text: str, known: frozenset[str]) -> float:
    words = words_of(text)
    return sum(word in known for word in words) / len(words) if words else 0.0
