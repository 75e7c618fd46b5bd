"""Denoising steps as Gaussians: against numbers worked out by hand, torch's Normal and diffusers' own sampler."""

import math
from typing import Any

import pytest
import torch

from recipes.models.images.ddpm import Ddpm
from rlhf.algorithms.advantages import grouped_advantages
from rlhf.algorithms.denoising import build_chain, gaussian_kl, gaussian_logprobs


def test_a_log_probability_by_hand() -> None:
    actions = torch.tensor([1.0, 2.0, 0.5, 0.5]).view(1, 2, 1, 1, 2)
    means = torch.tensor([0.0, 2.0, 0.5, 0.25]).view(1, 2, 1, 1, 2)
    found = gaussian_logprobs(actions, means, torch.tensor([1.0, 0.5]))
    # step 0: deviations 1 and 0 of sd 1; step 1: 0 and 0.5 of sd 0.5
    first = -0.5 * 1.0 - 2 * 0.9189385332046727
    second = -0.5 * 0.25 - 2 * (0.9189385332046727 + math.log(0.5))
    assert found.tolist() == [pytest.approx([first, second], abs=1e-12)]


def test_log_probabilities_are_those_of_a_normal_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    actions, means = (torch.randn(3, 2, 1, 4, 4, generator=generator) for _ in range(2))
    sd = torch.tensor([0.3, 0.02])
    wanted = torch.distributions.Normal(means.double(), sd.double().view(1, -1, 1, 1, 1)).log_prob(actions.double())
    torch.testing.assert_close(gaussian_logprobs(actions, means, sd), wanted.sum(dim=(2, 3, 4)))


def test_kl_by_hand() -> None:
    means, reference = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2), torch.tensor([0.0, 0.5]).view(1, 1, 1, 1, 2)
    assert gaussian_kl(means, reference, torch.tensor([0.5])).tolist() == [[pytest.approx(0.5 * (4.0 + 1.0))]]
    assert gaussian_kl(means, means, torch.tensor([0.5])).tolist() == [[0.0]]


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0, 16.0])
    groups = torch.tensor([0, 0, 1, 1, 1])
    deviation = math.sqrt((4 + 4 + 16) / 3)
    wanted = [-1.0, 1.0, -2 / deviation, -2 / deviation, 4 / deviation]
    assert grouped_advantages(rewards, groups, 5.0).tolist() == pytest.approx(wanted, abs=1e-6)
    assert grouped_advantages(rewards, groups, 1.2).max() == pytest.approx(1.2)
    whole = grouped_advantages(rewards, torch.zeros(5, dtype=torch.long), 5.0)
    assert whole[0] == pytest.approx(-7 / math.sqrt((49 + 25 + 4 + 4 + 64) / 5), abs=1e-6)
    assert grouped_advantages(torch.ones(3), torch.zeros(3), 5.0).tolist() == [0.0, 0.0, 0.0]


def test_a_floor_holds_for_actions_alone() -> None:
    abar = torch.linspace(0.999, 0.01, 100)
    timesteps = torch.tensor([99, 50, 10, 0])
    free, held = build_chain(abar, timesteps, 0.0), build_chain(abar, timesteps, 0.3)
    assert held.sd_S[:-1].tolist() == pytest.approx([max(0.3, sd) for sd in free.sd_S[:-1].tolist()])
    assert float(free.sd_S[:-1].min()) < 0.3
    assert held.sd_S[-1] == 0
    assert held.num_actions == 3


def test_timesteps_must_fall() -> None:
    with pytest.raises(ValueError, match="timesteps must fall"):
        build_chain(torch.linspace(0.999, 0.01, 100), torch.tensor([10, 50]), 0.0)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_chain_is_diffusers_ancestral_sampler(betas: Any) -> None:
    from trainers.models.images.ddpm import build_scheduler

    settings = Ddpm(family="ddpm", prediction="x0", betas=betas)
    scheduler = build_scheduler(settings, "ddpm", is_clipped=False)
    scheduler.set_timesteps(7)
    chain = build_chain(scheduler.alphas_cumprod, scheduler.timesteps.long(), 0.0)
    generator = torch.Generator().manual_seed(1)
    noisy, clean = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(2))
    for step, timestep in enumerate(scheduler.timesteps):
        noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        drawn = scheduler.step(clean, timestep, noisy, generator=torch.Generator().manual_seed(step)).prev_sample
        mine = chain.clean_S[step] * clean + chain.noisy_S[step] * noisy + chain.sd_S[step] * noise
        torch.testing.assert_close(mine, drawn, rtol=1e-4, atol=1e-5)
