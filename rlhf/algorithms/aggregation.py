"""What a step's loss is the mean of: its actions, its samples, or its samples at one nominal length.

A loss is a sum of weighted actions over all ranks and micro-batches, divided by what the step's samples add up to. Both
follow from the whole mini-batch, so that neither the number of ranks nor the size of a micro-batch changes the mean.

Shapes: N samples of all ranks, A actions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """How much each action of an iteration's samples counts in a step."""

    actions_NA: Tensor
    """Weight of each action's loss; 0 where the policy did not act."""
    samples_N: Tensor
    """What each sample adds to the number that a step's weighted sum is divided by."""

    def without(self, left_out_N: Tensor) -> "Weights":
        """Samples that are left out count neither above the line nor below it."""
        kept_N = ~left_out_N
        return Weights(self.actions_NA * kept_N[:, None], self.samples_N * kept_N)

    def times(self, factors_NA: Tensor) -> "Weights":
        """Each action counts so many times as much; what a sum is divided by stays."""
        return Weights(self.actions_NA * factors_NA, self.samples_N)

    def scale(self, rows: Sequence[int], num_actions: float) -> float:
        """What the weights of a step's samples are multiplied by: their loss is then a sum over `num_actions`.

        Whoever divides by the number of actions gets the mean that was asked for; 0 where all samples are left out.
        """
        divisor = float(self.samples_N[torch.as_tensor(rows, device=self.samples_N.device)].double().sum())
        return num_actions / divisor if divisor > 0 else 0.0


Aggregation = Callable[[Tensor], Weights]
"""From the action mask of all samples to what each action counts."""


def token_mean(action_mask_NA: Tensor) -> Weights:
    """The mean over all actions: each counts the same, so that a long sample counts more than a short one (DAPO)."""
    return Weights(action_mask_NA.float(), action_mask_NA.float().sum(dim=1))


def sequence_mean(action_mask_NA: Tensor) -> Weights:
    """The mean over samples of the mean over a sample's actions (GRPO as it was published): 1 / (N |o_i|)."""
    mask_NA = action_mask_NA.float()
    lengths_N = mask_NA.sum(dim=1)
    return Weights(mask_NA / lengths_N[:, None].clamp(min=1.0), (lengths_N > 0).float())


def constant_length(action_mask_NA: Tensor, length: int) -> Weights:
    """The sum over actions divided by samples times one length (Liu et al. 2025, Dr. GRPO): 1 / (N length).

    No sample's own length enters, so that a long wrong answer is not blamed less in each of its tokens.
    """
    mask_NA = action_mask_NA.float()
    return Weights(mask_NA / length, (mask_NA.sum(dim=1) > 0).float())
