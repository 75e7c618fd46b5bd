"""Advantages on response tokens: generalised advantage estimation and whitening.

Shapes: B samples, R response tokens. A mask is True where the policy acted.
"""

import torch
from torch import Tensor


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
