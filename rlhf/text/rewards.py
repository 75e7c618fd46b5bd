"""The reward of a stage that tunes a language model: what its terms give each response, and the score of all together.

Shapes: N samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.rewards.terms import TextTerm
from rlhf.text.responses import Responses


@dataclass(frozen=True)
class JudgeTerm:
    """A term that is a reward model: whoever runs the model brings its raw scores."""

    name: str
    statistics: ScoreStatistics
    clip: float

    def normalised(self, scores_N: Tensor) -> Tensor:
        """Scores in deviations from the held-out mean, clipped."""
        return self.statistics.normalise(scores_N).clamp(-self.clip, self.clip)


@dataclass(frozen=True)
class TextReward:
    """All terms of a stage: reward models, of which a policy learns from one at most, and terms that read texts.

    What an environment gives has a weight here, and comes with the samples.
    """

    weights: Mapping[str, float]
    """By the terms' names, in the recipe's order."""
    judges: Sequence[JudgeTerm] = ()
    terms: Sequence[TextTerm] = ()
    records: Sequence[Mapping[str, Any]] = ()
    """Of the prompts, by row."""
    decode: Callable[[Sequence[int]], str] = str
    """From the tokens of a response to its text."""

    def read(self, responses: Responses) -> list[dict[str, float]]:
        """What each response is worth to the terms that read texts; no model is asked."""
        texts = [self.decode(tokens) for tokens in responses.action_ids] if self.terms else []
        return self.read_texts(texts, responses.sample_ids_B.tolist())

    def read_texts(self, texts: Sequence[str], rows: Sequence[int]) -> list[dict[str, float]]:
        """The same of the texts of responses to the prompts of these rows."""
        records = [self.records[row] for row in rows] if self.terms else []
        columns = {term.name: term.values(texts, records) for term in self.terms}
        return [{name: values[place] for name, values in columns.items()} for place in range(len(rows))]

    def by_term(
        self, read: Sequence[Mapping[str, float]], *scores_N: Tensor, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Raw values [N] of every term, in the recipe's order; `scores_N` are the reward models', in theirs."""
        found = {judge.name: raw_N for judge, raw_N in zip(self.judges, scores_N, strict=True)}
        for name in self.weights.keys() - found.keys():
            found[name] = torch.tensor([by[name] for by in read], dtype=torch.float32, device=device)
        return {name: found[name] for name in self.weights}

    def score(self, by_term: Mapping[str, Tensor]) -> Tensor:
        """Scores [N] that a policy learns: the weighted sum, a reward model's share normalised and clipped."""
        normalised = {judge.name: judge.normalised(by_term[judge.name]) for judge in self.judges}
        return self._sum({**by_term, **normalised})

    def raw_score(self, by_term: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [N] of what the terms gave."""
        return self._sum(by_term)

    def _sum(self, by_term: Mapping[str, Tensor]) -> Tensor:
        first, *others = (self.weights[name] * value_N for name, value_N in by_term.items())
        return sum(others, first)
