"""What benchmarks have in common whose answers a model writes."""

from collections.abc import Mapping, Sequence
from typing import Self

from recipes.fields import meaning
from recipes.smoke_sizes import RESPONSE_TOKENS
from recipes.stages.answers import Template
from recipes.stages.benchmarks.case import Asked


class Written(Asked):
    """Questions that a model answers in its own words; terms of a reward say what an answer is worth."""

    template: Template = meaning(
        "none", description="chat: the prompt, examples included, is the user's turn of the model's chat template."
    )
    max_new_tokens: int = meaning(128, ge=1, le=10**6, description="Longest answer.")
    temperature: float = meaning(0.0, ge=0, le=100, description="0: the likeliest token each time; above: drawn.")
    stop: list[str] = meaning(
        default_factory=list, max_length=16, description="Texts that end an answer; what follows is not scored."
    )

    @property
    def surroundings(self) -> str:
        return self.template

    @property
    def writes(self) -> int:
        return self.max_new_tokens

    def cut(self, text: str) -> str:
        """An answer up to the first text that ends it."""
        ends = [place for mark in self.stop if (place := text.find(mark)) >= 0]
        return text[: min(ends, default=len(text))].strip()

    def judged_draws(self, by_term: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Each figure for one case, by what each term gives its draws."""
        return {name: values[0] for name, values in by_term.items()}

    def shrunk(self) -> Self:
        return super().shrunk().changed(max_new_tokens=min(self.max_new_tokens, RESPONSE_TOKENS))
