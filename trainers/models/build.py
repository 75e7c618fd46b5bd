"""From a recipe's architecture to a language model with random weights: the one place that knows every family."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainers.models.decoder import TokenizerFacts, build_decoder
from trainers.models.encoder_decoder import build_encoder_decoder


def build_language_model(
    architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
) -> nn.Module:
    """Build with fp32 weights that depend on the seed alone.

    `architecture` holds `family`, `type` and the configuration's keys; sizes and ids of the vocabulary come from
    `facts`.
    """
    match architecture["family"]:
        case "decoder":
            return build_decoder(architecture, facts, seed=seed, device=device)
        case "rnn":
            return _build_rnn(architecture, facts, seed)
        case "encoder":
            return _build_bert(architecture, facts, seed)
        case "encoder_decoder":
            return build_encoder_decoder(architecture, facts, seed=seed, device=device)
    raise ValueError(f"unknown family {architecture['family']!r}")


def _build_bert(architecture: Mapping[str, Any], facts: TokenizerFacts, seed: int) -> nn.Module:
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertForMaskedLM

    config = BertConfig(
        **{name: value for name, value in architecture.items() if name not in ("family", "type")},
        vocab_size=facts.vocab_size,
        bos_token_id=facts.bos_id,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.pad_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config).float()


def _build_rnn(architecture: Mapping[str, Any], facts: TokenizerFacts, seed: int) -> nn.Module:
    from trainers.models.rnn import RnnConfig, RnnForCausalLM

    keys = {name: value for name, value in architecture.items() if name not in ("family", "type")}
    config = RnnConfig(
        **keys,
        cell=architecture["type"],
        vocab_size=facts.vocab_size,
        bos_token_id=facts.bos_id,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RnnForCausalLM(config).float()
