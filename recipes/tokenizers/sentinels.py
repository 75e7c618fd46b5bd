"""T5's sentinel tokens, which stand for hidden spans."""

from collections.abc import Collection
from itertools import count

SENTINEL = "<extra_id_{}>"
"""T5's name of the token that stands for the n-th hidden span."""


def count_sentinels(tokens: Collection[str]) -> int:
    """Sentinels among the tokens, counted from the first until one is missing."""
    return next(number for number in count() if SENTINEL.format(number) not in tokens)
