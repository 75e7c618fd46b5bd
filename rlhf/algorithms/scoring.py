"""From a reward model's raw scores to the per-token rewards that PPO learns from.

Shapes: B samples, R response tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and standard deviation of a reward model's scores on held-out responses, stored in its artifact."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"score statistics need a finite mean and a positive std; found {self.mean} and {self.std}"
            )

    def normalise(self, scores_B: Tensor) -> Tensor:
        """Scores in standard deviations from the held-out mean."""
        return (scores_B.float() - self.mean) / self.std


def shaped_scores(scores_B: Tensor, ended_B: Tensor, missing_eos_penalty: float) -> Tensor:
    """Scores, of which a response without an end token pays the penalty."""
    return scores_B - missing_eos_penalty * (~ended_B).to(scores_B.dtype)


def token_rewards(kl_BR: Tensor, shaped_scores_B: Tensor, response_mask_BR: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score at the response's last token; 0 outside the response."""
    rewards_BR = torch.where(response_mask_BR, -kl_coef * kl_BR, 0.0)
    last_B = response_mask_BR.sum(dim=1) - 1
    if not bool((last_B >= 0).all()):
        raise ValueError("a response has no token")
    at_end_BR = torch.arange(response_mask_BR.shape[1], device=last_B.device)[None, :] == last_B[:, None]
    return rewards_BR + torch.where(at_end_BR, shaped_scores_B[:, None].to(rewards_BR.dtype), 0.0)
