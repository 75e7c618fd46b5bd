"""bf16 rounds so coarsely that log-probabilities depend on micro-batches' shapes: the first ratio is 1 even so."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from recipes.errors import StageError
from recipes.stages.sharding import Shard
from rlhf.invariants import (
    MEAN_ROUNDINGS,
    RARE_ROUNDINGS,
    density_scales,
    require_ratio_one,
    require_reference,
    token_scales,
)
from tests.tiers import tiered

Build = Callable[..., Any]
SIZES = {"width": 512, "vocabulary": 4096, "layers": 2}
U = 2.0**-8


@pytest.mark.parametrize("lora", tiered([True, False], [True]))
def test_every_iteration_begins_with_ratios_of_exactly_one(tiny_ppo: Build, lora: bool) -> None:
    shard = Shard(engine="plain", precision="bf16")
    ppo = tiny_ppo(lora=lora, prompts=16, sizes=SIZES, max_new_tokens=12, shard=shard, iterations=2, epochs=1)
    done = ppo.run()
    assert [step["log_ratio"] == 0 for step in done] == [True, False, True, False]
    reports = [heard for _, heard in ppo.listener.heard]
    assert reports[0]["kl"] == 0
    assert reports[-1]["kl"] > 0.01
    assert 0 < reports[0]["sampler_gap"] < 10 * U < reports[0]["sampler_gap_max"] + 10 * U

    maker, experience = ppo.source.experience, ppo.source._begin(2).estimate.experience
    maker.policy.learner = replace(maker.learner, micro_batch=1)
    alone = maker.judged(experience.samples, [range(16)], {}).logprobs_BA
    assert not torch.equal(alone, experience.scored.logprobs_NA)  # the same weights in other micro-batches


def test_roundings_pass_and_a_wrong_temperature_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, 64, generator=generator)
    exact = logits.log_softmax(1)[:, 0]
    rounded = (logits * (1 + U * (2 * torch.rand(logits.shape, generator=generator) - 1))).log_softmax(1)[:, 0]
    require_ratio_one(rounded - exact, token_scales(exact), U)
    require_reference(rounded, exact, token_scales(exact), U)
    hotter = (logits / 1.05).log_softmax(1)[:, 0]
    with pytest.raises(StageError, match=rf"on average \(at most {MEAN_ROUNDINGS:g}\)"):
        require_ratio_one(hotter - exact, token_scales(exact), U)
    with pytest.raises(StageError, match=r"its reference: .* up to"):
        require_reference(hotter, exact, token_scales(exact), U)
    with pytest.raises(StageError, match="disagree"):
        require_ratio_one(torch.full((3,), torch.nan), torch.ones(3), U)


def test_a_few_rows_of_another_policy_do_not_hide_in_the_mean() -> None:
    wrong = torch.zeros(1000)
    wrong[:20] = 2 * RARE_ROUNDINGS * U
    assert wrong.mean() < MEAN_ROUNDINGS * U
    with pytest.raises(StageError, match="99% quantile"):
        require_ratio_one(wrong, torch.ones(1000), U)


@pytest.mark.parametrize("distance", [0.0, 30.0, 4000.0])
def test_a_step_s_density_changes_by_what_rounding_its_mean_does(distance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(500, 48, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(500, 48, generator=generator, dtype=torch.float64), dim=1)
    change = -0.5 * ((z - U * distance * direction).square() - z.square()).sum(1)
    roundings = change.abs() / (U * density_scales(torch.tensor(distance), U))
    assert roundings.mean() < 1
    assert distance == 0 or roundings.mean() > 0.3
