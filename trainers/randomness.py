"""Seeds keyed by what they are for, never by rank or history."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """Return standard normal noise [B, *shape], each sample's from its own seed and the stream's number."""
    count = math.prod(shape)
    drawn = np.empty((len(seeds_B), count), dtype=np.float32)
    for row, generator in enumerate(_generators(seeds_B, stream)):
        generator.standard_normal(out=drawn[row], dtype=np.float32)
    return torch.from_numpy(drawn).view(len(seeds_B), *shape).to(like)


def uniforms(seeds_B: Tensor, stream: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return noise [B, *shape] uniform in [0, 1), each sample's from its own seed and the stream's number."""
    drawn = np.empty((len(seeds_B), math.prod(shape)), dtype=np.float32)
    for row, generator in enumerate(_generators(seeds_B, stream)):
        generator.random(out=drawn[row], dtype=np.float32)
    return torch.from_numpy(drawn).view(len(seeds_B), *shape).to(like)


def _generators(seeds_B: Tensor, stream: int) -> Iterator[np.random.Generator]:
    """Yield a Philox generator (Salmon et al. 2011) at the start of each (seed, stream).

    It is one generator, set anew for each sample: a new one takes four times as long.
    """
    bits = np.random.Philox(key=0)
    generator = np.random.Generator(bits)
    state: Any = bits.state
    for seed in seeds_B.tolist():
        state["state"]["key"] = np.array([seed, stream], dtype=np.uint64)
        bits.state = state
        yield generator
