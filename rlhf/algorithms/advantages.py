"""Credit assignment: from rewards of a whole iteration to advantages; generalised advantage estimation, whitening.

Shapes: B samples, N samples of all ranks, R response tokens. A mask is True where the policy acted.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rewarded:
    """What credit is assigned from: an iteration's samples of all ranks."""

    rewards_NR: Tensor
    """Per token, penalties included."""
    action_mask_NR: Tensor
    values_NR: Tensor | None
    """The critic's, of the state before each token; None where there is no critic."""
    groups_N: Tensor
    """Number of each sample's prompt: samples of one prompt are compared with each other."""


@dataclass(frozen=True)
class Credit:
    """What a policy, and a critic where there is one, learn from."""

    advantages_NR: Tensor
    """Whitened."""
    returns_NR: Tensor | None
    """What the critic learns; None where there is none."""
    deviation: float
    """Of the advantages before they were whitened: units of the score in one of an advantage."""


class CreditAssignment(Protocol):
    """Assigns an iteration's rewards to its actions; pure."""

    @property
    def needs_critic(self) -> bool:
        """Whether it uses values."""

    def __call__(self, rewarded: Rewarded) -> Credit:
        """Return advantages, 0 where the policy did not act."""


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation (Schulman et al. 2016), whitened over all samples."""

    gamma: float
    lam: float
    needs_critic: bool = True

    def __call__(self, rewarded: Rewarded) -> Credit:
        """Estimate; the values are those of a critic."""
        assert rewarded.values_NR is not None
        mask_NR = rewarded.action_mask_NR
        advantages_NR, returns_NR = estimate_advantages(
            rewarded.rewards_NR, rewarded.values_NR, mask_NR, self.gamma, self.lam
        )
        deviation = float(masked_deviation(advantages_NR, mask_NR))
        return Credit(whiten(advantages_NR, mask_NR), returns_NR, deviation)


def estimate_advantages(
    rewards_BR: Tensor,
    values_BR: Tensor,
    action_mask_BR: Tensor,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by GAE (Schulman et al. 2016, equations 11-16), both zero where the policy did not act.

    A token that the policy did not write carries value and advantage across: it is no step of the process. Rewards at
    such tokens are ignored. `bootstrap_B` is the value after the last action; None means that every response has ended.
    """
    advantages_BR = torch.zeros_like(values_BR)
    next_value_B = torch.zeros_like(values_BR[:, 0]) if bootstrap_B is None else bootstrap_B.to(values_BR)
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BR.shape[1])):
        acted_B = action_mask_BR[:, t]
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BR[:, t] = torch.where(acted_B, advantage_B, 0.0)
        next_advantage_B = torch.where(acted_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(acted_B, values_BR[:, t], next_value_B)
    returns_BR = torch.where(action_mask_BR, advantages_BR + values_BR, 0.0)
    return advantages_BR, returns_BR


def masked_deviation(x_BR: Tensor, mask_BR: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Standard deviation (with 1/N) of the masked entries, of which there are some: what `whiten` divides by."""
    kept = x_BR[mask_BR].double()
    return torch.sqrt(((kept - kept.mean()) ** 2).mean() + epsilon)


def whiten(x_BR: Tensor, mask_BR: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 (with 1/N) over the masked entries, 0 elsewhere; give it the entries of every rank."""
    kept = x_BR[mask_BR].double()
    if kept.numel() == 0:
        return torch.zeros_like(x_BR)
    mean = kept.mean()
    deviation = masked_deviation(x_BR, mask_BR, epsilon)
    return torch.where(mask_BR, ((x_BR.double() - mean) / deviation).to(x_BR.dtype), 0.0)
