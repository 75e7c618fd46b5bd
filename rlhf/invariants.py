"""What must hold before anything is learnt, and between a policy and its samples; else the stage stops."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.errors import StageError

UNTOUCHED_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest |ratio - 1| and |log-ratio to the reference| before anything was learnt."""


@dataclass(frozen=True)
class WeightsVersion:
    """Which policy: its iteration and the digest of its effective weights."""

    iteration: int
    digest: str


def weights_digest(tensors: Iterable[tuple[str, Tensor]], base: str) -> str:
    """Digest of effective weights: the frozen base by its own digest, every trained tensor by name and bytes."""
    digest = hashlib.sha256(base.encode())
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"\n{name}\n{tuple(tensor.shape)}\n{tensor.dtype}\n".encode())
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def require_version(found: WeightsVersion, wanted: WeightsVersion) -> None:
    """Stop the stage if samples were not drawn by the learner's present weights."""
    if found != wanted:
        raise StageError(
            f"rollouts come from weights {found.digest[:12]} of iteration {found.iteration}; "
            f"the learner holds {wanted.digest[:12]} of iteration {wanted.iteration}"
        )


def require_reference(logprobs: Tensor, reference_logprobs: Tensor, tolerance: float) -> None:
    """Stop the stage if actor and reference differ before anything was learnt."""
    difference = float((logprobs - reference_logprobs).abs().max())
    if not difference <= tolerance:
        raise StageError(
            f"the actor is not its reference at the start: log-probabilities differ by {difference:.2e} "
            f"(at most {tolerance:.0e})"
        )


def require_ratio_one(max_ratio_error: Tensor, tolerance: float) -> None:
    """Stop the stage if the policy gives its own samples another probability before the first update."""
    error = float(max_ratio_error)
    if error > tolerance:
        raise StageError(
            f"the policy that samples and the one that learns disagree: |ratio - 1| is "
            f"{error:.2e} before the first update (at most {tolerance:.0e})"
        )
