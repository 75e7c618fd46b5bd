"""The size of a language model from outside the recipe, by its `config.json` alone (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.models.architecture import TYPES
from recipes.models.base import LanguageArchitecture
from recipes.models.decoder import Llama
from recipes.models.vision_language import tower_parameters


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What sizes are predicted from."""

    architecture: LanguageArchitecture
    vocab_size: int
    further_parameters: int = 0
    """Beyond those that the architecture's keys give: a head that is not the embedding, a vision tower."""


def known_model(config: Mapping[str, Any]) -> KnownModel | None:
    """The model of a configuration file; None for a type that is not counted, or where a number is missing."""
    try:
        if config.get("model_type") == "llava":
            text = _text_model(config["text_config"])
            if text is None:
                return None
            further = text.further_parameters + tower_parameters(config)
            return KnownModel(text.architecture, text.vocab_size, further)
        return _text_model(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _text_model(config: Mapping[str, Any]) -> KnownModel | None:
    kind, further = config.get("model_type"), 0
    if kind == "qwen2":  # within vision-language models alone: llama, with biases of queries, keys and values
        known: type[LanguageArchitecture] | None = Llama
        heads = int(config["num_attention_heads"])
        read = heads + 2 * int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        further = int(config["num_hidden_layers"]) * read * width
    else:
        known = TYPES[kind].architecture if kind in TYPES else None
    architecture = None if known is None else known.from_config(config)
    if known is None or architecture is None:
        return None
    return KnownModel(architecture, int(config["vocab_size"]), further + known.further_parameters(config))
