"""The nearest of the names that would be right."""

import difflib
from collections.abc import Sequence


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate that a typing mistake most likely meant."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(lowered), n=1, cutoff=0.6)
    if close:
        return lowered[close[0]]
    swapped = [candidate for candidate in candidates if sorted(candidate) == sorted(word)]
    if len(word) == 2 and len(swapped) == 1:
        return swapped[0]
    inside = [candidate for candidate in candidates if len(word) >= 3 and (word in candidate or candidate in word)]
    return inside[0] if len(inside) == 1 else None
