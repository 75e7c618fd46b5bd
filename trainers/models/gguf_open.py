"""GGUF files opened by stock transformers, with what its reader leaves out of their metadata put back.

transformers' table of keys skips what a model of default settings does not need: head sizes, rotary scaling, soft caps,
sliding windows. Each changes the logits and none is missed when the file opens, so every key of a file's architecture
is carried here, or the file is refused by it. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import RequestError
from trainers.store.hf_loaders import open_gguf_file

_CARRIED = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys of an architecture that transformers does not read, with those of its configuration that they decide."""
_READ_HERE = ("attention.value_length", "rope.dimension_count", "rope.scaling.")
ROPE_FACTORS = "rope_freqs.weight"
"""By what each rotary frequency is divided, as files of Llama 3.1 and later hold it."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the one size whose attention llama.cpp scales by the width of the model instead of that of a head."""


def demand_package() -> None:
    """Raise RequestError where the package that reads and writes GGUF files is not installed."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise RequestError("the package gguf is not installed; pip install 'trainwright[gguf]'")


def read_metadata(file: Path) -> dict[str, Any]:
    """Return a file's metadata, of lists of texts their lengths alone; raises RequestError for what is none."""
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(file))
    except (ValueError, struct.error) as error:
        raise RequestError(f"{file}: not a whole GGUF file ({error})") from None
    if metadata.get("split.count", 1) > 1:
        raise RequestError(
            f"{file} is one of {metadata['split.count']} parts; join them first: llama-gguf-split --merge"
        )
    return metadata


def open_gguf(file: Path, dtype: torch.dtype) -> Any:
    """Return the causal language model of a file, dequantised, its configuration without a word of quantisation.

    Raises RequestError naming a key or a tensor that would be left out.
    """
    demand_package()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = open_config(file)
    model, info = open_gguf_file(AutoModelForCausalLM, file, config=config, dtype=dtype, output_loading_info=True)
    lacking = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    lacking += _left_out(file, model)
    if lacking:
        raise RequestError(f"{file}: tensors that do not fit {type(model).__name__}: {', '.join(sorted(lacking)[:8])}")
    # The weights are plain ones; a model that calls itself quantised is neither saved nor converted.
    for left, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        vars(left).pop(name, None)
    model.config._name_or_path = ""
    opened: nn.Module = model.eval()
    return opened


def open_config(file: Path) -> Any:
    """Return the configuration of a file's model, with all that its metadata say of it."""
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    metadata = read_metadata(file)
    try:
        given, _ = PretrainedConfig.get_config_dict(file.parent, gguf_file=file.name, local_files_only=True)
    except (ValueError, NotImplementedError) as error:
        raise RequestError(f"{file}: {error}") from None
    if metadata["general.architecture"] not in GGUF_CONFIG_ARCHS:
        given = given | _further(file, metadata, given)
    return CONFIG_MAPPING[given["model_type"]].from_dict(given)


def _further(file: Path, metadata: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that transformers' reader leaves out; raises RequestError for a key that is not read."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    name = metadata["general.architecture"]
    known = GGUF_CONFIG_MAPPING.get(str(given["model_type"]).removesuffix("_text"), {})
    keys = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    left = {key: value for key, value in keys.items() if known.get(key) is None}
    found = {_CARRIED[key]: value for key, value in left.items() if key in _CARRIED}
    unread = [key for key in left if key not in _CARRIED and key not in known and not key.startswith(_READ_HERE)]
    if unread:
        raise RequestError(f"{file}: {name}.{unread[0]} is {left[unread[0]]!r}; a model with it is not read")
    width = keys.get("attention.key_length", given["hidden_size"] // given["num_attention_heads"])
    if keys.get("attention.value_length", width) != width:
        raise RequestError(f"{file}: {name}.attention.value_length differs from key_length, {width}")
    if keys.get("rope.dimension_count", width) != width:
        found["partial_rotary_factor"] = keys["rope.dimension_count"] / width
    if name.startswith("gemma"):
        is_27b = keys["block_count"] == _LAYERS_OF_27B.get(name)
        found["query_pre_attn_scalar"] = given["hidden_size"] // given["num_attention_heads"] if is_27b else width
    scaling = _rope_scaling(file, keys)
    return found | ({} if scaling is None else {"rope_scaling": scaling | {"rope_theta": given["rope_theta"]}})


def _rope_scaling(file: Path, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how positions are stretched beyond those of pretraining; None: they are not."""
    prefix = "rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)}
    factors = _rope_factors(file)
    kind = scaling.get("type", "none")
    if factors is not None and kind == "none":
        found = {"rope_type": "llama3", "factor": round(float(factors.max()), 3), **LLAMA3_ROPE}
        theta = float(keys.get("rope.freq_base", 10_000.0))
        if torch.allclose(factors, llama3_factors(found, theta, 2 * len(factors)), rtol=1e-5):
            return found
        raise RequestError(f"{file}: {ROPE_FACTORS} are not the factors of Llama 3")
    if kind == "linear":
        return {"rope_type": "linear", "factor": scaling["factor"]}
    if kind == "yarn" and set(scaling) <= {"type", "factor", "original_context_length", "finetuned"}:
        original = scaling["original_context_length"]
        return {"rope_type": "yarn", "factor": scaling["factor"], "original_max_position_embeddings": original}
    if kind != "none" or factors is not None:
        raise RequestError(f"{file}: rotary scaling {kind!r} with {', '.join(sorted(scaling))} is not read")
    return None


def llama3_factors(scaling: Mapping[str, Any], theta: float, width: int) -> Tensor:
    """Return by what Llama 3.1 divides each rotary frequency, [width / 2]; transformers' `llama3` rope."""
    wavelengths = 2 * torch.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _rope_factors(file: Path) -> Tensor | None:
    from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict

    held = load_gguf_state_dict(GgufHeader.from_file(str(file))) if _has_rope_factors(file) else {}
    return held[ROPE_FACTORS][...].float() if held else None


def _has_rope_factors(file: Path) -> bool:
    from transformers.integrations.gguf import read_gguf_metadata

    return ROPE_FACTORS in read_gguf_metadata(str(file))[1]


def _left_out(file: Path, model: nn.Module) -> list[str]:
    """Return the tensors of a file that found no place in the model: transformers skips them without a word."""
    from transformers.integrations.gguf import is_gguf_arch_supported, read_gguf_metadata
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    metadata, names = read_gguf_metadata(str(file))
    name = metadata["general.architecture"]
    if is_gguf_arch_supported(name):
        return []
    settings: Any = model.config
    processor = TENSOR_PROCESSORS.get(name, TensorProcessor)(config=settings.to_dict())
    placed = {*get_gguf_hf_weights_map(model, processor), ROPE_FACTORS, *(["output.weight"] if name == "gpt2" else [])}
    return [tensor for tensor in names if tensor not in placed]
