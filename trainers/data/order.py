"""Shuffled order as a pure function: which row stands at a position, without any sampler state."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ROUNDS = 6
TABLE_ROWS = 2**16
"""Sets of at most so many rows have the order of an epoch made at once, which costs a fiftieth a row."""


@lru_cache(maxsize=64)
def _epoch_key(digest: str, seed: int, epoch: int) -> bytes:
    return hashlib.blake2b(f"{digest}\n{seed}\n{epoch}".encode(), digest_size=32).digest()


@lru_cache(maxsize=2**15)
def _mix(key: bytes, round_index: int, value: int) -> int:
    """Round function of the Feistel network: 64 pseudo-random bits of (key, round, value).

    Half a position has few values (64 for 1,797 rows), so that an epoch asks for the same ones again and again.
    """
    message = bytes((round_index,)) + value.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")


def sample_at(digest: str, seed: int, epoch: int, position: int, size: int) -> int:
    """Return the row at `position` (0 <= position < size) of the shuffled epoch; a permutation of range(size).

    A balanced Feistel network over the next even power of two with cycle walking (Black and Rogaway 2002, section 3):
    O(1) memory and time, no dependence on workers, micro-batches or history.
    """
    if not 0 <= position < size:
        raise ValueError(f"position {position} is outside of 0..{size - 1}")
    key = _epoch_key(digest, seed, epoch)
    if size <= TABLE_ROWS:
        return int(_epoch_order(key, size)[position])
    half_bits = _half_bits(size)
    half_mask = (1 << half_bits) - 1
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_index in range(ROUNDS):
            left, right = right, left ^ (_mix(key, round_index, right) & half_mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def _half_bits(size: int) -> int:
    return max(1, ((size - 1).bit_length() + 1) // 2)


@lru_cache(maxsize=4)
def _epoch_order(key: bytes, size: int) -> np.ndarray:
    """Return the row at every position of an epoch: the same network over all values at once."""
    half_bits = _half_bits(size)
    half_mask = (1 << half_bits) - 1
    values = np.arange(1 << (2 * half_bits))
    left, right = values >> half_bits, values & half_mask
    for round_index in range(ROUNDS):
        mixed = np.array([_mix(key, round_index, value) & half_mask for value in range(half_mask + 1)])
        left, right = right, left ^ mixed[right]
    found = (left << half_bits) | right
    order = found[:size]
    while (outside := order >= size).any():
        order = np.where(outside, found[order], order)
    return order


def epoch_order(digest: str, seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the row at every position of an epoch, as `sample_at` gives them."""
    return _epoch_order(_epoch_key(digest, seed, epoch), size)


def global_sample(digest: str, seed: int, position: int, size: int) -> int:
    """Return the row at global `position` of an endless sequence of epochs."""
    return sample_at(digest, seed, position // size, position % size, size)


def deal_by_length(
    rows: Sequence[int], lengths: Sequence[int], rank: int, workers: int, micro_batch: int
) -> list[list[int]]:
    """Return a rank's micro-batches of a step's rows: ranks work equally long, and padding stays small.

    `lengths[row]` is the number of tokens of a row.
    """
    by_length = sorted(rows, key=lambda row: (-lengths[row], row))
    own = by_length[rank::workers]
    return [own[start : start + micro_batch] for start in range(0, len(own), micro_batch)]


def deal_by_group(
    rows: Sequence[int], lengths: Sequence[int], groups: Sequence[int], rank: int, workers: int, micro_batch: int
) -> list[list[int]]:
    """The same, but with rows of a group (`groups[row]`) next to each other, so that a micro-batch has few groups.

    Every rank gets equally many rows, where these can be divided by the ranks.
    """
    longest: dict[int, int] = {}
    for row in rows:
        longest[groups[row]] = max(lengths[row], longest.get(groups[row], 0))
    order = sorted(rows, key=lambda row: (-longest[groups[row]], groups[row], -lengths[row], row))
    shares = []
    for start in range(0, len(order), workers * micro_batch):
        round_ = order[start : start + workers * micro_batch]
        size = len(round_) // workers
        shares.append(round_[rank * size : (rank + 1) * size])
    return shares


def drawn_rows(digest: str, seed: int, count: int, size: int) -> list[int]:
    """Return `count` distinct rows (all of them where there are fewer), drawn by the seed."""
    return [sample_at(digest, seed, 0, position, size) for position in range(min(count, size))]
