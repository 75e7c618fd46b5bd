"""Samples of another program than the learner: weights of truncated importance sampling, and where they end a stage."""

import math

import pytest
import torch

from recipes.errors import StageError
from rlhf.algorithms.aggregation import token_mean
from rlhf.algorithms.importance import sampler_importance
from rlhf.invariants import SAMPLER_ROUNDINGS, require_sampler
from trainers.inference.rollouts import WeightsVersion


def test_weights_are_ratios_up_to_the_bound() -> None:
    learner = torch.tensor([[-1.0, -2.0, -0.5]])
    sampler = torch.tensor([[-1.0, -1.0, -3.0]])
    assert sampler_importance(learner, sampler, 2.0).tolist() == [[1.0, pytest.approx(math.exp(-1)), 2.0]]


def test_the_weighted_mean_is_that_of_the_learner() -> None:
    """Over all tokens that the sampler may draw the untruncated weights undo its probabilities."""
    generator = torch.Generator().manual_seed(0)
    learner, sampler = torch.randn(2, 50, generator=generator).log_softmax(dim=1)
    values = torch.randn(50, generator=generator)
    weights = sampler_importance(learner[None], sampler[None], 1e9)[0]
    corrected = float((sampler.exp() * weights * values).sum())
    assert corrected == pytest.approx(float((learner.exp() * values).sum()), abs=1e-6)
    assert abs(float((sampler.exp() * values).sum()) - corrected) > 0.05


def test_a_weighted_action_counts_so_much_more_and_the_divisor_stays() -> None:
    weights = token_mean(torch.tensor([[True, True, False], [True, False, False]]))
    weighted = weights.times(torch.tensor([[0.5, 2.0, 7.0], [1.0, 7.0, 7.0]]))
    assert weighted.actions_NA.tolist() == [[0.5, 2.0, 0.0], [1.0, 0.0, 0.0]]
    assert weighted.scale([0, 1], 3.0) == weights.scale([0, 1], 3.0)


@pytest.mark.parametrize("share", [0.9, 1.1, math.nan])
def test_a_sampler_of_another_policy_ends_the_stage(share: float) -> None:
    gaps, scales, roundoff = torch.full((5,), share * SAMPLER_ROUNDINGS * 1e-6), torch.ones(5), 1e-6
    if share < 1:
        require_sampler(gaps, scales, roundoff, WeightsVersion(3, 12))
        return
    with pytest.raises(StageError, match="iteration 3, step 12"):
        require_sampler(gaps, scales, roundoff, WeightsVersion(3, 12))
