"""Decoder-only transformers by transformers' own classes, imported one by one because each takes a second."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainers.models.attention import attention_name


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model's configuration takes from its tokenizer."""

    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None


def build_decoder(
    architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
) -> nn.Module:
    """Build a causal language model with random fp32 weights that depend on the seed alone.

    `architecture` holds `type` and transformers' configuration keys; sizes and ids of the vocabulary come from `facts`.
    """
    config_class, model_class = decoder_classes(architecture["type"])
    keys = {name: value for name, value in architecture.items() if name not in ("family", "type") and value is not None}
    if architecture["type"] != "gpt2":
        # None means "as many" and "as wide as fits" for every type; transformers' own defaults are fixed numbers.
        keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
        keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    config = config_class(
        **keys,
        vocab_size=facts.vocab_size,
        bos_token_id=facts.bos_id,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.pad_id,
        attn_implementation=attention_name(device),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class(config)
    return model.float()


def decoder_classes(model_type: str) -> tuple[Any, Any]:
    """Return the configuration class and the causal language model class of a decoder type."""
    match model_type:
        case "llama":
            from transformers.models.llama.configuration_llama import LlamaConfig
            from transformers.models.llama.modeling_llama import LlamaForCausalLM

            return LlamaConfig, LlamaForCausalLM
        case "qwen3":
            from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
            from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

            return Qwen3Config, Qwen3ForCausalLM
        case "gpt2":
            from transformers.models.gpt2.configuration_gpt2 import GPT2Config
            from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

            return GPT2Config, GPT2LMHeadModel
    raise ValueError(f"unknown decoder type {model_type!r}")
