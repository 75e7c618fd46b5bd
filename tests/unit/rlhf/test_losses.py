"""PPO's and Bradley-Terry's losses against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.losses import PolicyLoss, clipped_surrogate, policy_loss, ranking_loss, value_loss
from rlhf.algorithms.ratios import token_log_ratios

ALL = torch.tensor([[True]])


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **bounds: float) -> PolicyLoss:
    bounds = {"clip_low": 0.2, "clip_high": 0.2, **bounds}
    log_ratios = token_log_ratios(logprobs, old, mask)
    return policy_loss(clipped_surrogate(log_ratios, advantages, **bounds), log_ratios, mask, mask.float())


def one(ratio: float, advantage: float, **options: float) -> float:
    logprobs = torch.tensor([[math.log(ratio)]])
    return float(surrogate(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), ALL, **options).loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # held at 1.2
        (0.5, 2.0, -1.0),  # a lower ratio is no gain: not held
        (0.5, -2.0, 1.6),  # held at 0.8
        (1.5, -2.0, 3.0),  # a worse action made likelier: not held
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float) -> None:
    assert one(ratio, advantage) == pytest.approx(loss, rel=1e-5)


def test_low_and_high_clip_are_separate() -> None:
    assert one(2.0, 1.0, clip_high=0.5) == pytest.approx(-1.5, rel=1e-5)
    assert one(0.1, -1.0, clip_low=0.4) == pytest.approx(0.6, rel=1e-5)


def test_dual_clip_bounds_negative_advantages_only() -> None:
    assert one(5.0, -1.0) == pytest.approx(5.0, rel=1e-5)
    assert one(5.0, -1.0, dual_clip=3.0) == pytest.approx(3.0, rel=1e-5)
    assert one(5.0, 1.0, dual_clip=3.0) == pytest.approx(-1.2, rel=1e-5)


def test_padding_counts_nothing_even_when_it_is_wild() -> None:
    mask = torch.tensor([[True, False]])
    old = torch.tensor([[0.0, -1e9]])
    new = torch.tensor([[0.0, 5.0]], requires_grad=True)
    out = surrogate(new, old, torch.tensor([[1.0, 1e9]]), mask)
    out.loss.backward()
    assert out.loss.item() == -1.0
    assert float(out.clipped) == 0
    assert float(out.max_log_ratio) == 0
    assert new.grad is not None
    assert new.grad.tolist() == [[-1.0, 0.0]]


def test_ratio_is_clamped_before_exp() -> None:
    out = surrogate(torch.tensor([[500.0]]), torch.zeros(1, 1), torch.tensor([[-1.0]]), ALL)
    assert float(out.loss) == pytest.approx(math.exp(20.0))


def test_gradient_is_that_of_the_score_function_at_ratio_one() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, True]])
    surrogate(logprobs, logprobs.detach().clone(), torch.tensor([[0.5, -3.0]]), mask).loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5, 3.0]]))


def test_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]])
    assert float(value_loss(values, old, returns, ALL).loss) == pytest.approx(0.5)
    clipped = value_loss(values, old, returns, ALL, clip=0.2)
    assert float(clipped.loss) == pytest.approx(0.5 * 1.8**2)
    assert float(clipped.clipped) == 1
    assert float(clipped.squared_error) == pytest.approx(1.0)


def test_value_clip_never_lowers_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(4, 9, generator=generator) for _ in range(3))
    mask = torch.rand(4, 9, generator=generator) < 0.7
    assert value_loss(values, old, returns, mask, clip=0.2).loss >= value_loss(values, old, returns, mask).loss


def test_ranking_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    wanted = math.log(1 + math.exp(-1)) + math.log(2)
    assert float(ranking_loss(chosen, rejected)) == pytest.approx(wanted)
    assert float(ranking_loss(chosen, rejected, center_coefficient=0.1)) == pytest.approx(wanted + 0.1)


def test_ranking_loss_depends_on_differences_only() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.1])
    moved: Tensor = ranking_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(ranking_loss(chosen, rejected), moved)
