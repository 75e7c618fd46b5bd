"""Model folders in the Hugging Face layout: written byte for byte from the same weights, probed, verified by stock classes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

ModelKind = Literal["language_model", "score_model", "value_model"]
"""Stock class: AutoModelForCausalLM, ...SequenceClassification with one label, ...TokenClassification with one label."""


@dataclass(frozen=True)
class Probe:
    """Outputs of a live model on the fixed prompt, fp32."""

    token_ids: list[int]
    outputs: np.ndarray

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        raise NotImplementedError

    @staticmethod
    def from_bytes(data: bytes) -> "Probe":
        """Read what `to_bytes` wrote."""
        raise NotImplementedError


def write_model(
    folder: Path,
    kind: ModelKind,
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Mapping[str, bytes],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, safetensors, generation_config.json (language models) and the tokenizer's files; rank 0 only."""
    raise NotImplementedError


def write_adapter(
    folder: Path, peft_config: Any, tensors: Iterable[tuple[str, Tensor]], *, base_digest: str, dtype: torch.dtype
) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's layout; the base is named by digest; rank 0 only."""
    raise NotImplementedError


def probe(model: nn.Module, kind: ModelKind, vocab_size: int) -> Probe:
    """Run the fixed prompt through a bare, unsharded model in evaluation mode."""
    raise NotImplementedError


def verify_folder(folder: Path, kind: ModelKind, expected: Probe | None, *, adapter: Path | None = None) -> float:
    """Open with stock classes, demand the exact key set, shapes, finite values and tied weights; return the largest output difference.

    With `adapter` the peft adapter is put on the model first. Raises StageError naming what is wrong.
    """
    raise NotImplementedError


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest output difference that a verification accepts."""
    return 1e-5 if dtype == torch.float32 else 2e-2
