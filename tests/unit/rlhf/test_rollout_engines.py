"""What a rollout engine promises, asked of the training ranks and of one with weights and draws of its own."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from recipes.errors import StageError
from tests.unit.rlhf.tiny_ppo import EOS, OpenRollouts, TinyPpo
from trainers.data.batches import PromptBatch
from trainers.engine.protocol import Engine
from trainers.inference.generation import SamplingSettings
from trainers.inference.rollouts import (
    LocalRollouts,
    Sampled,
    SampleKey,
    WeightsVersion,
    generate_in_parts,
)
from trainers.runtime.observer import Watch

Build = Callable[..., TinyPpo]
POLICY = "networks.policy."


class OwnCopy:
    """Samples as another process would: from a copy that takes weights over at `sync`, by its own draws."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._seed = engine, seed
        module: Any = engine.module
        self._network = copy.deepcopy(module.networks["policy"])
        self._version = WeightsVersion(-1, -1)

    def sync(self, iteration: int) -> WeightsVersion:
        weights = {
            name.removeprefix(POLICY): tensor
            for name, tensor in self._engine.full_parameters()
            if name.startswith(POLICY)
        }
        self._network.load_state_dict(weights, strict=False)
        self._version = WeightsVersion(iteration, self._engine.steps_applied)
        return self._version

    def generate(
        self, prompts: PromptBatch, keys: Sequence[SampleKey], sampling: SamplingSettings, watch: Watch
    ) -> Sampled:
        width = sampling.max_new_tokens
        draws = [np.random.default_rng([self._seed, self._version.iteration, *key]).random(width) for key in keys]
        with torch.no_grad():
            drawn = generate_in_parts(self._network, prompts, sampling, np.stack(draws), 3)
        return Sampled.of(drawn, self._version)


class NeverSynced(OwnCopy):
    """Says that it took the weights over, and keeps the first ones."""

    def sync(self, iteration: int) -> WeightsVersion:
        if iteration == 0:
            return super().sync(iteration)
        self._version = WeightsVersion(iteration, self._engine.steps_applied)
        return self._version


ENGINES = pytest.mark.parametrize("open_rollouts", [LocalRollouts, OwnCopy])


def ask(ppo: TinyPpo, keys: Sequence[SampleKey]) -> Sampled:
    policy = ppo.source.experience.policy
    prompts = PromptBatch(
        torch.tensor([[1, 5], [6, 7]]), torch.tensor([[False, True], [True, True]]), torch.tensor([0, 1])
    )
    return policy.rollouts.generate(prompts, keys, policy.sampling, lambda share: None)  # type: ignore[attr-defined]


@ENGINES
def test_equal_keys_and_weights_give_equal_responses(tiny_ppo: Build, open_rollouts: OpenRollouts) -> None:
    ppo = tiny_ppo(lora=False, open_rollouts=open_rollouts)
    version = ppo.source.experience.policy.sync(0)
    first, again, other = (ask(ppo, keys) for keys in ([(0, 0), (1, 0)], [(0, 0), (1, 0)], [(0, 1), (1, 1)]))
    assert version == first.version
    assert (version.iteration, version.steps_applied) == (0, 0)
    assert torch.equal(first.tokens_BR, again.tokens_BR)
    assert not torch.equal(first.tokens_BR, other.tokens_BR)
    for tokens, mask, reason in zip(first.tokens_BR, first.response_mask_BR, first.stop_reasons, strict=True):
        assert (tokens[mask][-1] == EOS) == (reason == "stop")
        assert reason == "stop" or int(mask.sum()) == len(mask)


@ENGINES
def test_a_policy_learns_from_it(tiny_ppo: Build, open_rollouts: OpenRollouts) -> None:
    ppo = tiny_ppo(
        lora=False, open_rollouts=open_rollouts, wants_one_token=True, prompts=32, micro_batch=16, iterations=12,
        kl_coef=0.0, missing_eos_penalty=0.0,
    )  # fmt: skip
    ppo.run()
    reports = [heard for _, heard in ppo.listener.heard]
    assert reports[-1]["score_mean"] > 2 * reports[0]["score_mean"]
    assert max(report["sampler_gap_max"] for report in reports) < 1e-4


def test_weights_that_were_not_taken_over_show(tiny_ppo: Build) -> None:
    honest = tiny_ppo(lora=False, open_rollouts=OwnCopy)
    honest.run(last=1)
    policy: Any = honest.source.experience.policy
    policy.sync = lambda iteration: WeightsVersion(iteration, honest.engine.steps_applied)
    with pytest.raises(StageError, match=r"after 0 steps, for iteration 0; .* step 1, iteration 1"):
        honest.source.experience.estimate(1, 0.0, [range(8)])
    hidden = tiny_ppo(lora=False, open_rollouts=NeverSynced, iterations=3, epochs=4)
    hidden.run()
    gaps = [heard["sampler_gap"] for _, heard in hidden.listener.heard]
    assert gaps[0] < 1e-5 < 100 * gaps[0] < gaps[-1]
