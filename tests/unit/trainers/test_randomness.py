"""Noise and seeds are those of their plain definition, however they are made."""

import numpy as np
import torch

from trainers.randomness import normals, stream_seed, stream_seeds, uniforms


def test_noise_is_that_of_a_generator_of_its_own_for_each_sample() -> None:
    seeds = torch.tensor([5, 2**62 + 7, 0])

    def fresh(seed: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))

    like = torch.empty(0)
    wanted = np.stack([fresh(seed, 3).standard_normal(6, dtype=np.float32) for seed in seeds.tolist()])
    np.testing.assert_array_equal(normals(seeds, 3, (2, 3), like).reshape(3, 6), wanted)
    wanted = np.stack([fresh(seed, 1).random(5, dtype=np.float32) for seed in seeds.tolist()])
    np.testing.assert_array_equal(uniforms(seeds, 1, (5,), like), wanted)


def test_many_seeds_are_those_of_one_at_a_time() -> None:
    numbers = [0, 9, 10**12]
    assert stream_seeds(7, "noise", numbers) == [stream_seed(7, "noise", number) for number in numbers]
