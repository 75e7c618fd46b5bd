"""Noise and seeds are those of their plain definition, however they are made."""

import math

import numpy as np
import pytest
import torch

from trainers.runtime.randomness import BLOCK, normals, stream_seed, stream_seeds, uniforms

SEEDS = [5, 2**62 + 7, 0, 1]
GOLDEN, WRAP = 0x9E3779B97F4A7C15, 2**64


def mix(value: int) -> int:
    """The last step of SplitMix64, as its authors publish it in C."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WRAP
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WRAP
    return value ^ (value >> 31)


def numbers(seed: int, stream: int, count: int) -> list[int]:
    """32-bit numbers one at a time, each 64-bit one giving its lower half first."""
    state = mix((mix(seed) + stream * GOLDEN) % WRAP)
    gamma = mix((state + GOLDEN) % WRAP) | 1
    whole = [mix((state + place * gamma) % WRAP) for place in range(1, count)]
    return [half for number in whole for half in (number % 2**32, number >> 32)][:count]


def test_the_hash_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 1234567, as in other implementations of it.
    assert [mix((1234567 + step * GOLDEN) % WRAP) for step in (1, 2)] == [6457827717110365317, 3203168211198807973]


def test_noise_is_that_of_its_plain_definition() -> None:
    like = torch.empty(0)
    wanted = [[number // 256 / 2**24 for number in numbers(seed, 1, 5)] for seed in SEEDS]
    assert uniforms(torch.tensor(SEEDS), 1, (5,), like).tolist() == wanted
    drawn = normals(torch.tensor(SEEDS), 3, (5,), like)
    for seed, row in zip(SEEDS, drawn.tolist(), strict=True):
        found = [number / 2**32 for number in numbers(seed, 3, 6)]
        pairs = [
            (math.sqrt(-2 * math.log(one)), 2 * math.pi * other)
            for one, other in zip(found[:3], found[3:], strict=True)
        ]
        plain = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
        assert row == pytest.approx(plain[:5], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 5), (BLOCK // 3,)])
def test_a_samples_noise_does_not_know_its_neighbours(shape: tuple[int, ...]) -> None:
    seeds = torch.arange(11) * 977
    for draw in (normals, uniforms):
        together = draw(seeds, 4, shape, torch.empty(0))
        parts = [draw(part, 4, shape, torch.empty(0)) for part in seeds.split([1, 4, 6])]
        assert torch.equal(together, torch.cat(parts))


def test_noise_is_normal_and_uniform_and_knows_no_other_seed_place_or_stream() -> None:
    seeds, like = torch.arange(400), torch.empty(0)
    drawn, flat = normals(seeds, 7, (500,), like).double(), uniforms(seeds, 7, (500,), like).double()
    limit = 4.5 / math.sqrt(drawn.numel())  # 4.5 standard errors
    centred = (flat - 0.5) * math.sqrt(12)
    other = (uniforms(seeds, 8, (500,), like).double() - 0.5) * math.sqrt(12)
    for values in (drawn, centred):
        assert abs(float(values.mean())) < limit
        assert abs(float((values.square() - 1).mean())) < limit * math.sqrt(2)
        assert abs(float((values[1:] * values[:-1]).mean())) < limit * 1.01
        assert abs(float((values[:, 1:] * values[:, :-1]).mean())) < limit * 1.01
    assert abs(float((centred * other).mean())) < limit
    assert abs(float((drawn[:, :250] * drawn[:, 250:]).mean())) < limit * math.sqrt(2)
    assert abs(float((drawn.abs() > 2).double().mean()) - 0.0455) < 4.5 * math.sqrt(0.0455 / drawn.numel())
    counts = np.bincount((flat * 64).long().flatten().numpy(), minlength=64)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 63 + 4.5 * math.sqrt(2 * 63)


def test_many_seeds_are_those_of_one_at_a_time() -> None:
    places = [0, 9, 10**12]
    assert stream_seeds(7, "noise", places) == [stream_seed(7, "noise", number) for number in places]
