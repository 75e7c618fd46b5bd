"""T5's sentinel tokens, one for each hidden span."""

from collections.abc import Collection
from itertools import count

SENTINEL = "<extra_id_{}>"
"""T5's name of the token for the n-th hidden span."""


def count_sentinels(tokens: Collection[str]) -> int:
    """Sentinels among the tokens, counted from the first until one is missing."""
    return next(number for number in count() if SENTINEL.format(number) not in tokens)
