"""The size of a language model from outside the recipe, by its `config.json` alone (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.models.architecture import Architecture, Gpt2, Llama, Qwen3
from recipes.models.encoder import Bert
from recipes.models.encoder_decoder import T5, Bart
from recipes.models.rnn import Rnn

_TYPES: dict[str, type[Any]] = {
    "llama": Llama,
    "qwen3": Qwen3,
    "qwen2": Llama,
    "gpt2": Gpt2,
    "bert": Bert,
    "t5": T5,
    "bart": Bart,
}
"""What a `model_type` is counted as; qwen2, which stands in vision-language models alone, as llama."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What sizes are predicted from."""

    architecture: Architecture
    vocab_size: int
    further_parameters: int = 0
    """Beyond those that the architecture's keys give: a head that is not the embedding, a vision tower."""


def known_model(config: Mapping[str, Any]) -> KnownModel | None:
    """The model of a configuration file; None for a type that is not counted, or where a number is missing."""
    try:
        if config.get("model_type") == "llava":
            text = _text_model(config["text_config"])
            return None if text is None else _with_tower(config, text)
        return _text_model(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _text_model(config: Mapping[str, Any]) -> KnownModel | None:
    kind = config.get("model_type")
    if kind == "rnn":
        keys = {"family": "rnn", "type": config["cell"]}
        known = {name: config[name] for name in Rnn.model_fields if name in config and name not in keys}
        return KnownModel(Rnn.model_construct(**keys, **known), int(config["vocab_size"]))
    if kind not in _TYPES:
        return None
    made = _TYPES[kind]
    known = {name: config[name] for name in made.model_fields if name in config and name not in ("family", "type")}
    # Built without validation: the sizes need some of the keys, and files of others have values that recipes lack.
    architecture = made.model_construct(type=made.model_fields["type"].annotation.__args__[0], **known)
    required = [name for name, field in made.model_fields.items() if field.is_required() and name not in known]
    if set(required) - {"family", "type"}:
        return None
    vocab_size = int(config["vocab_size"])
    return KnownModel(architecture, vocab_size, _further(config, vocab_size))


def _further(config: Mapping[str, Any], vocab_size: int) -> int:
    match config["model_type"]:
        case "t5" if config.get("tie_word_embeddings") is False:
            return vocab_size * int(config["d_model"])
        case "qwen2":  # biases of queries, keys and values
            heads = int(config["num_attention_heads"])
            read = heads + 2 * int(config.get("num_key_value_heads") or heads)
            width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
            return int(config["num_hidden_layers"]) * read * width
    return 0


def _with_tower(config: Mapping[str, Any], text: KnownModel) -> KnownModel:
    """Add a CLIP or SigLIP tower and the projector, of two linear modules, to the decoder."""
    tower = config["vision_config"]
    width, inner, layers = (int(tower[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    patch, is_clip = int(tower["patch_size"]), tower["model_type"] == "clip_vision_model"
    places = (int(tower["image_size"]) // patch) ** 2 + is_clip
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    embedding = width * int(tower.get("num_channels", 3)) * patch * patch + places * width + width
    norms = 4 * width if is_clip else 2 * width
    count = layers * block + embedding + norms
    if not is_clip and tower.get("vision_use_head", True):  # attention pooling: a probe, an attention, a norm, an MLP
        count += width + 4 * (width * width + width) + 2 * width + 2 * width * inner + inner + width
    chosen = config.get("vision_feature_layer", -2)
    read = width * (len(chosen) if isinstance(chosen, list) else 1)
    made = int(config["text_config"]["hidden_size"])
    bias = bool(config.get("multimodal_projector_bias", True))
    count += read * made + made * made + 2 * made * bias
    return KnownModel(text.architecture, text.vocab_size, text.further_parameters + count)
