"""Encoder-only transformers by transformers' own classes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from recipes.models.encoder import Corruption
from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import type_records
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.masking import Masker
from trainers.data.tokenizer import Tokenization
from trainers.models.protocol import (
    FamilyRuntime,
    TokenizerFacts,
    initialised,
    library_class,
    library_config,
    library_keys,
)
from trainers.models.token_losses import MaskedTokenLosses
from trainers.objectives.masked_language_model import MaskedLanguageModelObjective
from trainers.objectives.protocol import Learning


class EncoderRuntime(FamilyRuntime):
    """BERT: hidden tokens in pretraining; `text_classifier.py` fine-tunes it to a classifier of texts."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("masked_model", "text_classifier")

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Build a masked language model."""
        kind = architecture["type"]
        config = library_config(kind, library_keys(architecture), facts, self.attention(device, kind))
        return initialised(self.stock_class(kind, "masked_model"), config, seed)

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        return library_class(model_type, kind)

    def attention(self, device: torch.device, model_type: str) -> str:
        """Return torch's own kernel, where the type's outputs allow it."""
        record = type_records()[model_type]
        return record.attention if device.type != "cpu" else record.cpu_attention

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the loss of hidden tokens, drawn from the seed."""
        corruption = (spec.corruption if isinstance(spec, Pretrain) else None) or Corruption()
        masker = Masker(corruption, tokenization, seed)
        module, objective = MaskedTokenLosses(model), MaskedLanguageModelObjective()
        return Learning(module, objective, masker.batch, predicts_next=False)
