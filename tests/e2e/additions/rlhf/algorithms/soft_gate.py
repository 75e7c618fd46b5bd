"""Soft gates: a ratio far from 1 loses weight gradually instead of being clipped."""

import torch
from torch import Tensor

from rlhf.algorithms.losses import Surrogate


def soft_gate(log_ratio_BR: Tensor, advantages_BR: Tensor, positive: float, negative: float) -> Surrogate:
    """SAPO's -A 4 sigmoid(temperature (ratio - 1)) / temperature (Gao et al. 2025, equation 5).

    Its gradient is that of -A ratio at ratio 1, and falls off on both sides; each sign of A has its temperature.
    """
    temperatures_BR = torch.where(advantages_BR > 0, positive, negative)
    gate_BR = torch.sigmoid(temperatures_BR * (torch.exp(log_ratio_BR) - 1)) * 4 / temperatures_BR
    return Surrogate(-advantages_BR * gate_BR, torch.zeros_like(advantages_BR, dtype=torch.bool))
