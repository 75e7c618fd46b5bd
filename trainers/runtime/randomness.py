"""Seeds keyed by what they are for, never by rank or history."""

import hashlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd."""
BLOCK = 2**15
"""Values of noise that are made at once."""


def stream_seed(seed: int, *key: str | int) -> int:
    """Return the 63-bit seed of one named stream."""
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream_seeds(seed: int, name: str, numbers: Iterable[int]) -> list[int]:
    """Return `stream_seed(seed, name, number)` of many numbers, hashing what they share once."""
    start = hashlib.blake2b(f"{seed}/{name}/".encode(), digest_size=8)
    found = []
    for number in numbers:
        digest = start.copy()
        digest.update(str(number).encode())
        found.append(int.from_bytes(digest.digest(), "little") >> 1)
    return found


def seed_torch(seed: int) -> None:
    """Seed torch's own generators; `torch.manual_seed` formats three stack traces where no GPU is in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def normals(seeds_B: Tensor, stream: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return standard normal noise [B, *shape], each sample's from its own seed and the stream's number.

    Pairs follow from pairs of uniform numbers (Box & Muller 1958); of 32 bits each, so that none is beyond 6.7.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    drawn = np.empty((len(seeds_B), 2 * half), dtype=np.float32)
    for rows in _blocks(len(seeds_B), count):
        bits = _bits(seeds_B.numpy()[rows], stream, 2 * half)
        radius = bits[:, :half].astype(np.float32)
        radius += np.float32(0.5)
        radius *= np.float32(2.0**-32)
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        angle = bits[:, half:].astype(np.float32)
        angle *= np.float32(2 * math.pi * 2.0**-32)
        np.multiply(radius, np.cos(angle), out=drawn[rows, :half])
        np.multiply(radius, np.sin(angle), out=drawn[rows, half:])
    return torch.from_numpy(drawn)[:, :count].reshape(len(seeds_B), *shape).to(like)


def uniforms(seeds_B: Tensor, stream: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return noise [B, *shape] uniform in [0, 1), each sample's from its own seed and the stream's number."""
    count = math.prod(shape)
    drawn = np.empty((len(seeds_B), count), dtype=np.float32)
    for rows in _blocks(len(seeds_B), count):
        drawn[rows] = _bits(seeds_B.numpy()[rows], stream, count) >> np.uint32(8)
    drawn *= np.float32(2.0**-24)
    return torch.from_numpy(drawn).view(len(seeds_B), *shape).to(like)


def _blocks(rows: int, count: int) -> Iterator[slice]:
    """Cut rows of `count` values into blocks that stay in the cache."""
    step = max(1, BLOCK // max(count, 1))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _bits(seeds_B: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Return 32-bit numbers [B, count] of (seed, stream): the SplitMix generator of Steele, Lea & Flood (2014).

    Number i of a sample is `mix(state + i * gamma)`, state and odd gamma being hashes of seed and stream: a function of
    the place alone, so that all samples' numbers are made at once and none depends on its neighbours.
    """
    state_B = _mix(_mix(seeds_B.astype(np.uint64)) + np.uint64(stream * GOLDEN % 2**64))
    gamma_B = _mix(state_B + np.uint64(GOLDEN)) | np.uint64(1)
    numbers_BN = np.arange(1, -(-count // 2) + 1, dtype=np.uint64) * gamma_B[:, None]
    numbers_BN += state_B[:, None]
    return _mix(numbers_BN).view(np.uint32)[:, :count]


def _mix(values: np.ndarray) -> np.ndarray:
    """Return the 64-bit hash of each value (Stafford's variant 13 of MurmurHash3's last step)."""
    shifted = values >> np.uint64(30)
    mixed = shifted ^ values
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed ^= shifted
    mixed *= np.uint64(0x94D049BB133111EB)
    np.right_shift(mixed, np.uint64(31), out=shifted)
    mixed ^= shifted
    return mixed
