"""Equal and nearly equal texts among those that came before."""

import hashlib
from array import array
from collections.abc import Mapping
from typing import Any

from recipes.data.filters import ByDuplicate, ByNearDuplicate
from trainers.data.filters.texts import runs, text_of, words_of

PERMUTATIONS = 128
RECALL = 0.999
"""Least share of the pairs at the threshold that become candidates."""


class Duplicates:
    """Finds texts that came before."""

    def __init__(self, settings: ByDuplicate) -> None:
        self._part = settings.of
        self._seen: set[bytes] = set()

    def drops(self, columns: Mapping[str, Any]) -> bool:
        """Tell whether an earlier row has this text, and remember it."""
        digest = hashlib.blake2b(text_of(columns, self._part).encode(), digest_size=16).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False


class NearDuplicates:
    """Finds texts that are near an earlier one that was kept (Broder 1997).

    Rows of a MinHash signature are hashed in bands (Leskovec et al. 2020, section 3.4); texts that share a band are
    compared by the exact Jaccard similarity of their runs of words. A kept text takes 8 bytes for each of its runs.
    """

    def __init__(self, settings: ByNearDuplicate) -> None:
        self._settings = settings
        self._rows = _rows_of_band(settings.threshold)
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._kept: list[array[int]] = []

    def drops(self, columns: Mapping[str, Any]) -> bool:
        """Tell whether a kept row is near enough, and else keep this one."""
        from rensa import RMinHash

        found = runs(words_of(text_of(columns, self._settings.of)), self._settings.ngram)
        sketch = RMinHash(PERMUTATIONS, 0)
        sketch.update(found)
        signature = array("Q", sketch.digest())
        own = frozenset(_number(run) for run in found)
        keys = [
            (band, signature[band : band + self._rows].tobytes())
            for band in range(0, PERMUTATIONS - self._rows + 1, self._rows)
        ]
        candidates = {number for key in keys for number in self._bands.get(key, ())}
        if any(self._is_near(own, self._kept[number]) for number in candidates):
            return True
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._kept))
        self._kept.append(array("Q", own))
        return False

    def _is_near(self, own: frozenset[int], other: "array[int]") -> bool:
        shared = sum(number in own for number in other)
        return shared >= self._settings.threshold * (len(own) + len(other) - shared)


def _rows_of_band(threshold: float) -> int:
    """Return how many rows a band has: the most that leave a pair at the threshold undetected once in a thousand."""
    fitting = [
        rows for rows in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    ]
    return max(fitting, default=1)


def _number(run: str) -> int:
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big")
