"""Decoder-only transformers by transformers' own classes, imported one by one because each takes a second."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.tokenizer import Tokenization
from trainers.models.attention import attention_name
from trainers.models.protocol import FamilyRuntime, ModelKind, TokenizerFacts, initialised, library_keys
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import Learning


class DecoderRuntime(FamilyRuntime):
    """Causal transformers."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("language_model", "score_model", "value_model")

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Build a causal language model; None in `architecture` means as if it were not given."""
        model_class = self.stock_class(architecture["type"], "language_model")
        keys = {name: value for name, value in library_keys(architecture).items() if value is not None}
        if "num_attention_heads" in keys:
            # None means "as many" and "as wide as fits" for every type; transformers' own defaults are fixed numbers.
            keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
            keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
        config = model_class.config_class(**keys, **facts.config_keys(), attn_implementation=self.attention(device))
        return initialised(model_class, config, seed)

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        match model_type:
            case "llama":
                from transformers.models.llama import modeling_llama as llama

                classes = (
                    llama.LlamaForCausalLM,
                    llama.LlamaForSequenceClassification,
                    llama.LlamaForTokenClassification,
                )
            case "qwen3":
                from transformers.models.qwen3 import modeling_qwen3 as qwen3

                classes = (
                    qwen3.Qwen3ForCausalLM,
                    qwen3.Qwen3ForSequenceClassification,
                    qwen3.Qwen3ForTokenClassification,
                )
            case "gpt2":
                from transformers.models.gpt2 import modeling_gpt2 as gpt2

                classes = (gpt2.GPT2LMHeadModel, gpt2.GPT2ForSequenceClassification, gpt2.GPT2ForTokenClassification)
            case _:
                raise ValueError(f"unknown decoder type {model_type!r}")
        return dict(zip(self.kinds, classes, strict=True))[kind]

    def attention(self, device: torch.device) -> str:
        """Return torch's own kernel on GPUs, the faster causal one on CPUs."""
        return attention_name(device)

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the next token's loss over packed rows."""
        return Learning(TokenLosses(model), LanguageModelObjective())


def build_decoder(
    architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
) -> nn.Module:
    """Build a causal language model with random fp32 weights that depend on the seed alone."""
    return DecoderRuntime().build(architecture, facts, seed=seed, device=device)
