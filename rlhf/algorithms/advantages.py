"""Credit assignment: from scores of a whole iteration to advantages; by a critic (GAE), or by comparison in groups.

Shapes: B samples, N samples of all ranks, R response tokens, A actions: response tokens, or denoising steps. A mask is
True where the policy acted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf.algorithms.scoring import token_rewards


@dataclass(frozen=True)
class Rewarded:
    """What credit is assigned from: an iteration's samples of all ranks."""

    scores_N: Tensor
    """Of whole samples, as the policy learns them."""
    kl_NA: Tensor
    """Of the policy against its start at each action, in nats; 0 elsewhere."""
    kl_coef: float
    """Weight of that penalty in the reward; 0 where it is in the loss."""
    action_mask_NA: Tensor
    values_NA: Tensor | None
    """The critic's, of the state before each action; None where there is no critic."""
    groups_N: Tensor
    """Number of each sample's prompt: samples of one prompt are compared with each other."""
    ended_N: Tensor
    """True where a sample came to its own end."""
    earlier_NA: Tensor | None = None
    """The part of the scores that was given at actions before the last, at these actions; None: there is none."""

    @property
    def rewards_NA(self) -> Tensor:
        """Of each action: its penalty, what was given there, and at the last one the rest of the score."""
        if self.earlier_NA is None:
            return token_rewards(self.kl_NA, self.scores_N, self.action_mask_NA, self.kl_coef)
        rest_N = self.scores_N - self.earlier_NA.sum(dim=1)
        return token_rewards(self.kl_NA, rest_N, self.action_mask_NA, self.kl_coef) + self.earlier_NA

    @property
    def totals_N(self) -> Tensor:
        """Of each sample: its score less the penalties of all its actions."""
        return self.scores_N - self.kl_coef * self.kl_NA.sum(dim=1)


@dataclass(frozen=True)
class Credit:
    """What a policy, and a critic where there is one, learn from."""

    advantages_NA: Tensor
    returns_NA: Tensor | None
    """What the critic learns; None where there is none."""
    deviation: float = 1.0
    """What a KL term in the loss is divided by: units of the score in one of an advantage."""


CreditAssignment = Callable[[Rewarded], Credit]
"""Assigns an iteration's rewards to its actions; pure. Advantages are 0 where the policy did not act."""


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation (Schulman et al. 2016), whitened over all samples."""

    gamma: float
    lam: float

    def __call__(self, rewarded: Rewarded) -> Credit:
        """Estimate; the values are those of a critic."""
        assert rewarded.values_NA is not None
        mask_NA = rewarded.action_mask_NA
        advantages_NA, returns_NA = estimate_advantages(
            rewarded.rewards_NA, rewarded.values_NA, mask_NA, self.gamma, self.lam
        )
        deviation = float(masked_deviation(advantages_NA, mask_NA))
        return Credit(whiten(advantages_NA, mask_NA), returns_NA, deviation)


@dataclass(frozen=True)
class GroupNormalised:
    """A sample's total reward, normalised over its group or over all samples; the same at all of its actions."""

    clip: float
    by_group: bool

    def __call__(self, rewarded: Rewarded) -> Credit:
        """Normalise; a KL term in the loss weighs nats against the deviation of the rewards."""
        groups_N = rewarded.groups_N if self.by_group else torch.zeros_like(rewarded.groups_N)
        advantages_N = grouped_advantages(rewarded.totals_N, groups_N, self.clip)
        return Credit(torch.where(rewarded.action_mask_NA, advantages_N[:, None], 0.0), None)


@dataclass(frozen=True)
class WhitenedReturns:
    """Rewards from each action on, whitened (Hu et al. 2025); where asked, of scores less their group's mean."""

    gamma: float
    by_group: bool

    def __call__(self, rewarded: Rewarded) -> Credit:
        """GAE without values and with lambda 1."""
        mask_NA = rewarded.action_mask_NA
        if self.by_group:
            compared_N = group_relative(rewarded.scores_N, rewarded.groups_N, "none")
            rewarded = replace(rewarded, scores_N=compared_N)
        rewards_NA = rewarded.rewards_NA
        returns_NA, _ = estimate_advantages(rewards_NA, torch.zeros_like(rewards_NA), mask_NA, self.gamma, 1.0)
        return Credit(whiten(returns_NA, mask_NA), None, float(masked_deviation(returns_NA, mask_NA)))


@dataclass(frozen=True)
class GroupRelative:
    """A sample's total reward less its group's mean, at all of its actions (Shao et al. 2024, section 4.1.2).

    `scale`: divided by the group's standard deviation, by that of the whole iteration, or by nothing (Liu et al. 2025).
    """

    scale: Literal["group", "batch", "none"]

    def __call__(self, rewarded: Rewarded) -> Credit:
        """Compare; a KL term in the loss weighs nats against the advantages as they are then scaled."""
        advantages_N = group_relative(rewarded.totals_N, rewarded.groups_N, self.scale)
        return Credit(torch.where(rewarded.action_mask_NA, advantages_N[:, None], 0.0), None)


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


def grouped_advantages(rewards_N: Tensor, groups_N: Tensor, clip: float, epsilon: float = 1e-8) -> Tensor:
    """Rewards less the mean of their group, over its deviation (with 1/N), clipped; give it the rewards of every rank.

    Black et al. 2023, section 4.2 (per-prompt normalisation), over one iteration.
    """
    rewards, advantages = rewards_N.double(), torch.zeros_like(rewards_N, dtype=torch.float64)
    for group in groups_N.unique():
        rows = groups_N == group
        own = rewards[rows]
        centred = own - own.mean()
        advantages[rows] = centred / torch.sqrt(centred.square().mean() + epsilon)
    return advantages.clamp(-clip, clip).to(rewards_N.dtype)


def group_relative(
    rewards_N: Tensor, groups_N: Tensor, scale: Literal["group", "batch", "none"], epsilon: float = 1e-4
) -> Tensor:
    """Rewards less the mean of their group, over a deviation plus `epsilon`; give it the rewards of every rank.

    Deviations are of a sample (1/(N-1)), as in TRL, verl and OpenRLHF; a sample alone in its group gets 0.
    """
    rewards, advantages = rewards_N.double(), torch.zeros_like(rewards_N, dtype=torch.float64)
    for group in groups_N.unique():
        rows = groups_N == group
        own = rewards[rows]
        advantages[rows] = own - own.mean()
        if scale == "group" and len(own) > 1:
            advantages[rows] /= own.std() + epsilon
    if scale == "batch" and len(rewards) > 1:
        advantages /= rewards.std() + epsilon
    return advantages.to(rewards_N.dtype)


def leave_one_out(rewarded: Rewarded) -> Credit:
    """A sample's total reward less the mean of its group's others, if any (Ahmadian et al. 2024, equation 5)."""
    totals_N = rewarded.totals_N.double()
    advantages_N = torch.zeros_like(totals_N)
    for group in rewarded.groups_N.unique():
        rows = rewarded.groups_N == group
        own = totals_N[rows]
        if len(own) > 1:
            advantages_N[rows] = own - (own.sum() - own) / (len(own) - 1)
    advantages_N = advantages_N.to(rewarded.scores_N.dtype)
    return Credit(torch.where(rewarded.action_mask_NA, advantages_N[:, None], 0.0), None)
