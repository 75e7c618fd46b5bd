"""Ratios of the policy to the one that sampled: of actions, or of whole samples.

Shapes: B samples, A actions. All give log-ratios [B, A], clamped, and 0 where the policy did not act.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.algorithms.kl import LOG_RATIO_LIMIT

LogRatios = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From log-probabilities, those of the policy that sampled, and the action mask."""


def token_log_ratios(logprobs_BA: Tensor, old_logprobs_BA: Tensor, mask_BA: Tensor) -> Tensor:
    """Each action's own."""
    log_ratio_BA = (logprobs_BA - old_logprobs_BA).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(mask_BA, log_ratio_BA, 0.0)


def product_log_ratios(logprobs_BA: Tensor, old_logprobs_BA: Tensor, mask_BA: Tensor) -> Tensor:
    """Of each whole sample, at all of its actions: the sum of their log-ratios, since a sample is one action (RLOO)."""
    log_ratio_BA = torch.where(mask_BA, logprobs_BA - old_logprobs_BA, 0.0)
    log_ratio_B = log_ratio_BA.sum(dim=1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(mask_BA, log_ratio_B[:, None], 0.0)


def mean_log_ratios(logprobs_BA: Tensor, old_logprobs_BA: Tensor, mask_BA: Tensor) -> Tensor:
    """Of each whole sample, at all of its actions: the mean of their log-ratios (Zheng et al. 2025, equation 7)."""
    log_ratio_BA = torch.where(mask_BA, logprobs_BA - old_logprobs_BA, 0.0)
    log_ratio_B = log_ratio_BA.sum(dim=1) / mask_BA.sum(dim=1).clamp(min=1)
    return torch.where(mask_BA, log_ratio_B.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[:, None], 0.0)
