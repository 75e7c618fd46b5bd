"""Model folders become GGUF files, as llama.cpp's converter writes them.

A file counts once stock transformers has opened it again: every tensor is within its format's rounding, the settings
are the same, texts become the same tokens, and the model with the file's weights gives the file's logits.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recipes.errors import RequestError
from recipes.models.folder_classes import find_class
from trainers.data.tokenizer import load_tokenization
from trainers.models.gguf_import import logits, probe_tokens
from trainers.models.gguf_open import ROPE_FACTORS, demand_package, llama3_factors, open_gguf
from trainers.models.gguf_tokenizer import differing_text, read_tokenizer, tokenizer_fields
from trainers.store.hf_loaders import open_model
from trainers.store.place import writing

Precision = Literal["f32", "f16", "bf16", "q8_0"]
_BLOCK = 32
"""Values of Q8_0 that share a scale."""
_TEXTS = [
    "The year 2024 had 366 days.",
    "  two  spaces\n\n\tand a tab",
    "d\u00e9j\u00e0 vu \u4f60\u597d \U0001f642",
    "it's 3.14!",
]
_SAID_ELSEWHERE = (
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "initializer_range",
    "max_window_layers", "model_type", "pad_token_id", "pretraining_tp", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache", "id2label", "label2id", "problem_type", "return_dict", "_name_or_path",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "is_encoder_decoder",
)  # fmt: skip
"""Settings that change no logit, or that the tokenizer's part of a file holds; head sizes show in the tensors."""


@dataclass(frozen=True)
class _Form:
    """How the format holds a type of model."""

    name: str
    """Of the architecture."""
    norms_from_one: bool = False
    """Whether norms are stored with the one that they are added to."""
    turns_heads: bool = False
    """Whether rows of queries and keys alternate between the halves of a head."""
    windows: Callable[[Any], dict[str, float]] = lambda config: {}


def _gemma2(config: Any) -> dict[str, float]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3(config: Any) -> dict[str, float]:
    local = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return {
        "attention.sliding_window": config.sliding_window,
        **({} if local == 1e4 else {"rope.freq_base_swa": local}),
    }


_FORMS = {
    "llama": _Form("llama", turns_heads=True),
    "mistral": _Form("llama", turns_heads=True),
    "qwen2": _Form("qwen2"),
    "qwen3": _Form("qwen3"),
    "gemma2": _Form("gemma2", norms_from_one=True, windows=_gemma2),
    "gemma3_text": _Form("gemma3", norms_from_one=True, windows=_gemma3),
}


def write_gguf(folder: Path, file: Path, precision: Precision = "bf16") -> float:
    """Write a model folder as one GGUF file; vectors stay in fp32.

    Returns how much the rounding of the weights changes the model: the mean Kullback-Leibler divergence of its next
    token, in nats. Raises RequestError for a model that the format does not hold, or whose file does not say the same.
    """
    demand_package()
    from transformers import AutoModelForCausalLM

    if file.exists():
        raise RequestError(f"{file} exists")
    raw = json.loads((folder / "config.json").read_bytes())
    form = _FORMS.get(raw["model_type"])
    if form is None or find_class(raw).kind != "model":
        what = (raw.get("architectures") or [raw["model_type"]])[0]
        raise RequestError(f"a GGUF file is written of language models of {', '.join(_FORMS)}; this is {what}")
    model = open_model(AutoModelForCausalLM, folder, dtype=torch.float32)
    building = file.with_name(f".{file.name}.{secrets.token_hex(6)}.gguf")
    with writing(file):
        try:
            kinds = _write(model, form, folder, building, precision)
            change = _verify(model, form, folder, building, kinds)
            os.rename(building, file)
        finally:
            building.unlink(missing_ok=True)
    return change


def _write(model: Any, form: _Form, folder: Path, file: Path, precision: Precision) -> dict[str, str]:
    """Write the file; returns the format of each tensor by the model's name of it."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.quants import quantize

    config = model.config
    (number,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == form.name)
    names = get_tensor_name_map(MODEL_ARCH(number), config.num_hidden_layers)
    writer = GGUFWriter(file, form.name)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[kinds[precision]])
    for key, value in _settings(config, form).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32 if type(value) is float else None
        (add or writer.add_uint32)(f"{form.name}.{key}", value)
    for key, value in tokenizer_fields(load_tokenization(folder), config.vocab_size).items():
        _add(writer, f"tokenizer.{key}", value)
    written = {}
    for name, tensor in _tensors(model):
        stem, suffix = name.rsplit(".", 1)
        found = names.get_name(stem)
        if found is None:
            raise RequestError(f"{name} has no name in a GGUF file of {form.name}")
        values = _laid_out(tensor, name, config, form).numpy()
        written[name] = kind = _format_of(values, precision)
        quantised = GGMLQuantizationType[kind.upper()]
        data = quantize(values, quantised)
        writer.add_tensor(f"{found}.{suffix}", data, raw_dtype=quantised)
    scaling = config.rope_parameters
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor(ROPE_FACTORS, llama3_factors(scaling, scaling["rope_theta"], _head_size(config)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _settings(config: Any, form: _Form) -> dict[str, Any]:
    """Return the metadata of an architecture."""
    nested = config.rope_parameters.get("full_attention")
    rope = config.rope_parameters if nested is None else nested
    width = _head_size(config)
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return found | form.windows(config)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor once: a head that is the embedding is not written."""
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if not (is_tied and name == "lm_head.weight"):
            yield name, tensor.float()


def _laid_out(tensor: Tensor, name: str, config: Any, form: _Form) -> Tensor:
    """Return a tensor as the format holds it."""
    if form.norms_from_one and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if not form.turns_heads or heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _format_of(values: np.ndarray, precision: Precision) -> str:
    """Return a tensor's format: fp32 for vectors, fp16 for rows that are no whole blocks of Q8_0."""
    if values.ndim < 2:
        return "f32"
    return "f16" if precision == "q8_0" and values.shape[-1] % _BLOCK else precision


def rounding(tensor: Tensor, kind: str) -> Tensor:
    """Return by how much each value may differ once it was written in a format.

    Half a unit in the last place; of Q8_0 half a step of the block's scale, the largest value / 127, itself in fp16.
    """
    if kind == "q8_0":
        blocks = tensor.reshape(*tensor.shape[:-1], -1, _BLOCK)
        largest = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).reshape(tensor.shape)
        return largest * (0.5 / 127 + 2**-10) + 127 * 2**-24
    bits, smallest = {"f32": (23, 2**-24), "f16": (11, 2**-25), "bf16": (8, 0.0)}[kind]
    return tensor.abs() * 2.0**-bits + smallest


def _verify(model: Any, form: _Form, folder: Path, file: Path, kinds: Mapping[str, str]) -> float:
    """Raise RequestError unless the file, opened by stock transformers, holds the model; returns its change."""
    opened = open_gguf(file, torch.float32)
    _compare_settings(model.config, opened.config, form)
    held = dict(opened.state_dict())
    for name, tensor in _tensors(model):
        excess = float(((held[name] - tensor).abs() - rounding(tensor, kinds[name])).max())
        if not excess <= 0:
            raise RequestError(f"{name} differs by {excess:.3g} more than {kinds[name]} explains")
    one, other = load_tokenization(folder), read_tokenizer(file)
    text = differing_text(one, other, [*_TEXTS, *one.special_tokens])
    said = [(item.eos_token, item.pad_token, item.bos_token, item.chat_template) for item in (one, other)]
    if text is not None or said[0] != said[1]:
        raise RequestError(
            f"the tokenizer cannot be said in GGUF: {'its tokens differ' if text is None else repr(text)}"
        )
    probe = probe_tokens(model.config.vocab_size)
    before, found = logits(model, probe), logits(opened, probe)
    model.load_state_dict(held)
    if not torch.equal(logits(model, probe), found):
        raise RequestError(f"with the file's weights the logits differ by {(logits(model, probe) - found).abs().max()}")
    log_p, log_q = (values.double().log_softmax(-1) for values in (before, found))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _compare_settings(config: Any, opened: Any, form: _Form) -> None:
    """Raise RequestError naming a setting of the model that a file cannot say."""
    wanted, found = ({**item.to_dict(), "sliding_window": _window(item)} for item in (config, opened))
    for key in wanted.keys() & found.keys() - set(_SAID_ELSEWHERE):
        if not _is_close(wanted[key], found[key]):
            raise RequestError(f"config.json: {key} is {wanted[key]!r}; a GGUF file of {form.name} says {found[key]!r}")


def _window(config: Any) -> int | None:
    """Return how far a model's attention reaches back; None: all the way, so far as the model is made for."""
    window: int | None = getattr(config, "sliding_window", None)
    is_off = getattr(config, "use_sliding_window", True) is False
    return None if is_off or window is None or window >= config.max_position_embeddings else window


def _is_close(one: Any, other: Any) -> bool:
    """Compare two settings; numbers of fp32 in a file are not those of fp64 in JSON."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_close(one[key], other[key]) for key in one)
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and bool(np.isclose(one, other, rtol=1e-6, atol=0))
    return bool(one == other)
