"""Encoder-only transformers by transformers' own classes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from recipes.models.encoder import Corruption
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.masking import Masker
from trainers.data.tokenizer import Tokenization
from trainers.models.protocol import FamilyRuntime, ModelKind, TokenizerFacts, initialised, library_keys
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
        from transformers.models.bert.configuration_bert import BertConfig

        keys = {**library_keys(architecture), **facts.config_keys()}
        config = BertConfig(**keys, attn_implementation=self.attention(device, architecture["type"]))
        return initialised(self.stock_class("bert", "masked_model"), config, seed)

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        from transformers.models.bert import modeling_bert as bert

        return bert.BertForMaskedLM if kind == "masked_model" else bert.BertForSequenceClassification

    def attention(self, device: torch.device, model_type: str) -> str:
        """Return torch's own kernel."""
        return "sdpa"

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the loss of hidden tokens, drawn from the seed."""
        corruption = (spec.corruption if isinstance(spec, Pretrain) else None) or Corruption()
        masker = Masker(corruption, tokenization, seed)
        module, objective = MaskedTokenLosses(model), MaskedLanguageModelObjective()
        return Learning(module, objective, masker.batch, predicts_next=False)
