"""Families of language models by name: the one place that knows all of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainers.models.protocol import FamilyRuntime, TokenizerFacts


def runtime_of(family: str) -> FamilyRuntime:
    """Return a family; each is imported when it is asked for, since the recurrent one takes a second."""
    match family:
        case "decoder":
            from trainers.models.decoder import DecoderRuntime

            return DecoderRuntime()
        case "rnn":
            from trainers.models.rnn import RnnRuntime

            return RnnRuntime()
        case "encoder":
            from trainers.models.encoder import EncoderRuntime

            return EncoderRuntime()
        case "encoder_decoder":
            from trainers.models.encoder_decoder import EncoderDecoderRuntime

            return EncoderDecoderRuntime()
        case "vision_language":
            from trainers.models.vision_language import VisionLanguageRuntime

            return VisionLanguageRuntime()
    raise ValueError(f"unknown family {family!r}")


def build_language_model(
    architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
) -> nn.Module:
    """Build with fp32 weights that depend on the seed alone.

    `architecture` holds `family`, `type` and the configuration's keys; sizes and ids of the vocabulary come from
    `facts`.
    """
    return runtime_of(architecture["family"]).build(architecture, facts, seed=seed, device=device)
