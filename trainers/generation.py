"""Sampling with a key-value cache: inverse-CDF draws from given uniforms, so that a draw depends on its key alone.

B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn; stop ids end a response and belong to it."""

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Generation:
    """Responses, right-padded with the pad id."""

    tokens_BR: Tensor
    response_mask_BR: Tensor
    """True at response tokens, the stop token included."""
    ended_B: Tensor
    """True where a stop token came."""


def generate(
    module: nn.Module,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    settings: SamplingSettings,
    uniforms_BR: np.ndarray | None,
) -> Generation:
    """Continue left-padded prompts; `uniforms_BR` (fp64 in [0, 1)) None draws greedily. Runs no collective."""
    raise NotImplementedError
