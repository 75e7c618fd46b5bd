"""Which pairs are worth a judgement (pure)."""

import math
from collections.abc import Sequence

from recipes.stages.feedback import PairChoice
from rlhf.feedback.judgements import Pair


def chosen_pairs(pairs: Sequence[Pair], choice: PairChoice) -> list[Pair]:
    """The pairs that a choice leaves, in their order; of equal ones those whose names come first.

    margin: the smallest difference of scores. disagreement: the largest |a / rms(a) - b / rms(b)|, where a and b are
    what two terms give the first answer more than the second, and rms is over all pairs.
    """
    if choice.by == "margin":
        worth = [-abs(pair.score_gain) for pair in pairs]
    else:
        one, other = ([_gain(pair, term) for pair in pairs] for term in choice.between)
        worth = [abs(a - b) for a, b in zip(_scaled(one), _scaled(other), strict=True)]
    ranked = sorted(range(len(pairs)), key=lambda place: (-worth[place], pairs[place].id))
    return [pairs[place] for place in sorted(ranked[: choice.pairs])]


def _gain(pair: Pair, term: str) -> float:
    return pair.rewards[0][term] - pair.rewards[1][term]


def _scaled(gains: Sequence[float]) -> list[float]:
    size = math.sqrt(sum(gain * gain for gain in gains) / len(gains))
    return [gain / size if size else 0.0 for gain in gains]
