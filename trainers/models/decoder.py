"""Causal language models by transformers' own classes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import type_records
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.tokenizer import Tokenization
from trainers.models.attention import attention_name
from trainers.models.protocol import (
    FamilyRuntime,
    TokenizerFacts,
    initialised,
    library_class,
    library_config,
    library_keys,
)
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import Learning

_DERIVED = ("llama", "qwen3")
"""Types whose recipes leave heads and their width to the library's arithmetic."""


class DecoderRuntime(FamilyRuntime):
    """Causal transformers."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("language_model", "score_model", "value_model")

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Build a causal language model; None in `architecture` means as if it were not given."""
        kind = architecture["type"]
        model_class = self.stock_class(kind, "language_model")
        keys = {name: value for name, value in library_keys(architecture).items() if value is not None}
        if kind in _DERIVED and "num_attention_heads" in keys:
            # None means "as many" and "as wide as fits" for these types; transformers' own defaults are fixed numbers.
            keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
            keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
        config = library_config(kind, keys, facts, self.attention(device, kind))
        return initialised(model_class, config, seed)

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        return library_class(model_type, kind)

    def attention(self, device: torch.device, model_type: str) -> str:
        """Return torch's own kernel on GPUs, the faster causal one on CPUs, where the type's outputs allow it."""
        record, own = type_records()[model_type], attention_name(device)
        if device.type != "cpu":
            return record.attention
        return own if record.cpu_attention == "block_causal" else record.cpu_attention

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the next token's loss over packed rows."""
        return Learning(TokenLosses(model), LanguageModelObjective())


def build_decoder(
    architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
) -> nn.Module:
    """Build a causal language model with random fp32 weights that depend on the seed alone."""
    return DecoderRuntime().build(architecture, facts, seed=seed, device=device)
