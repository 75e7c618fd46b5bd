"""Losses of RLHF as sums over masked tokens: whoever calls them divides by the global weight.

Shapes: B samples, R response tokens (or other actions), N pairs. A mask is True where a token counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Surrogate:
    """What a policy minimises at each action; anything where it did not act."""

    loss_BR: Tensor
    is_clipped_BR: Tensor
    """True where a bound held the ratio back."""


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the masked tokens."""

    loss: Tensor
    """Weighted."""
    clipped: Tensor
    """Tokens whose ratio the clip held back."""
    ratio: Tensor
    old_kl: Tensor
    """k3 of the policy against the one that sampled."""
    log_ratio: Tensor
    """Of absolute log-ratios."""
    max_log_ratio: Tensor
    """Largest absolute log-ratio; a maximum, not a sum."""


@dataclass(frozen=True)
class ValueLoss:
    """Sums over the masked tokens."""

    loss: Tensor
    clipped: Tensor
    """Tokens whose clipped error was the larger one."""
    squared_error: Tensor


def clipped_surrogate(
    log_ratio_BR: Tensor, advantages_BR: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Surrogate:
    """PPO's max(-A ratio, -A clip(ratio)) (Schulman et al. 2017, equation 7); its gradient is 0 where the clip acts.

    `dual_clip` bounds it where the advantage is negative (Ye et al. 2020, equation 5).
    """
    ratio_BR = torch.exp(log_ratio_BR)
    free_BR = -advantages_BR * ratio_BR
    held_BR = -advantages_BR * ratio_BR.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_BR = torch.maximum(free_BR, held_BR)
    if dual_clip is not None:
        bound_BR = -advantages_BR * dual_clip
        loss_BR = torch.where(advantages_BR < 0, torch.minimum(loss_BR, bound_BR), loss_BR)
    return Surrogate(loss_BR, (held_BR > free_BR).detach())


def truncated_importance(log_ratio_BR: Tensor, advantages_BR: Tensor, max_ratio: float) -> Surrogate:
    """CISPO's -A min(ratio, max_ratio) log ratio, the weight without a gradient (MiniMax 2025, equation 4).

    The gradient is that of -A weight log policy: no token loses it, whichever way its ratio has gone. The paper sets no
    lower bound either. Of the loss, log ratio instead of log policy: another constant, 0 for what was just drawn.
    """
    ratio_BR = torch.exp(log_ratio_BR.detach())
    return Surrogate(-advantages_BR * ratio_BR.clamp(max=max_ratio) * log_ratio_BR, ratio_BR > max_ratio)


def policy_loss(surrogate: Surrogate, log_ratio_BR: Tensor, mask_BR: Tensor, weights_BR: Tensor) -> PolicyLoss:
    """A surrogate's weighted sum, and what is watched of the log-ratios that it is of."""
    with torch.no_grad():
        ratio_BR = torch.exp(log_ratio_BR)
        clipped = (surrogate.is_clipped_BR & mask_BR).sum()
        old_kl = torch.where(mask_BR, torch.exp(-log_ratio_BR) - 1.0 + log_ratio_BR, 0.0).sum()
        ratio = torch.where(mask_BR, ratio_BR, 0.0).sum()
        distance_BR = log_ratio_BR.abs()
    loss = (torch.where(mask_BR, surrogate.loss_BR, 0.0) * weights_BR).sum()
    return PolicyLoss(
        loss=loss,
        clipped=clipped,
        ratio=ratio,
        old_kl=old_kl,
        log_ratio=distance_BR.sum(),
        max_log_ratio=distance_BR.max(),
    )


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    clip: float | None = None,
) -> ValueLoss:
    """Half the squared error, with `clip` the larger of it and that of the value held near the old one."""
    error_BR = (values_BR - returns_BR) ** 2
    loss_BR = error_BR
    clipped = torch.zeros((), device=values_BR.device)
    if clip is not None:
        held_BR = old_values_BR + (values_BR - old_values_BR).clamp(-clip, clip)
        held_error_BR = (held_BR - returns_BR) ** 2
        clipped = ((held_error_BR > error_BR) & mask_BR).sum()
        loss_BR = torch.maximum(error_BR, held_error_BR)
    loss = 0.5 * torch.where(mask_BR, loss_BR, 0.0).sum()
    squared_error = torch.where(mask_BR, error_BR, 0.0).sum().detach()
    return ValueLoss(loss=loss, clipped=clipped, squared_error=squared_error)


def ranking_loss(chosen_N: Tensor, rejected_N: Tensor, center_coefficient: float = 0.0) -> Tensor:
    """Sum over pairs of Bradley-Terry's -log sigmoid(chosen - rejected), plus a pull of their mean towards zero."""
    loss = -logsigmoid(chosen_N - rejected_N).sum()
    if center_coefficient > 0:
        loss = loss + center_coefficient * ((chosen_N + rejected_N) ** 2).sum()
    return loss
