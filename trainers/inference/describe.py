"""Writes `recipes/models/types.json`: what the pinned transformers has, measured on tiny models of random weights.

Usage: python -m trainers.inference.describe [TYPE ...]; without types all of them, which takes minutes.
"""

import argparse
import dataclasses
import json
import re
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, Literal, Union

from recipes.models.model_kinds import trained_kind
from recipes.models.type_table import FILE, TypeRecord, type_records
from recipes.models.vision_language import VISION_LANGUAGE
from trainers.inference.describe_decoders import measure_decoder
from trainers.inference.describe_encoders import measure_encoder, measure_encoder_decoder
from trainers.inference.describe_vision import UNOPENED, measure_vision
from trainers.models.small_vision import SMALL
from trainers.models.tiny import ALWAYS, said, tiny_model

FROM_TOKENIZER = (
    "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id",
    "cls_token_id",
)  # fmt: skip
NOT_OFFERED = (
    "use_cache",
    "forced_eos_token_id",
    "forced_bos_token_id",
    "tokenizer_class",
    "is_decoder",
    "add_cross_attention",
)
"""Keys that change no weight and no output of what is trained here, or follow from the kind of model."""
SHAPE_KEYS = {
    "width": ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "num_blocks"),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "d_kv", "v_head_dim"),
    "intermediate": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "encoder_ffn_dim"),
    "positions": ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_seq_len"),
}  # fmt: skip


class UnfitError(Exception):
    """A type of which no model is described."""


def describe(model_type: str) -> TypeRecord:
    """Return the record of a type; raises UnfitError for a type of no family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _described(model_type)


def _described(model_type: str) -> TypeRecord:
    import transformers

    family, classes = stock_classes(model_type)
    config_class = transformers.CONFIG_MAPPING[model_type]
    keys = dict(config_keys(config_class))
    if "vision_language_model" in classes:
        text = config_class().get_text_config().to_dict()
        return measure_vision(model_type, TypeRecord(family, classes, keys, shape=_shape_keys(text)))
    record = TypeRecord(family=family, classes=classes, keys=keys, shape=_shape_keys(keys))
    try:
        model = tiny_model(model_type, record, trained_kind(classes))
    except Exception as error:
        return replace(record, packing=None, decoding=None, lacks={"training": said(error)})
    record = replace(record, required=_required(model_type, record), **ends_of(model))
    record = replace(record, attention="sdpa" if model._supports_sdpa else "eager")
    match trained_kind(classes):
        case "masked_model":
            return measure_encoder(model_type, model, record)
        case "seq2seq_model":
            return measure_encoder_decoder(model_type, model, record)
    return measure_decoder(model_type, model, record)


def _shape_keys(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return which key is a type's width, its layers, ..."""
    first = {what: next((name for name in names if name in keys), None) for what, names in SHAPE_KEYS.items()}
    return {what: name for what, name in first.items() if name is not None}


def ends_of(model: Any) -> dict[str, Any]:
    """Return the names of the modules that embed and that predict tokens, by the record's keys."""
    paths = {id(module): path.rpartition(".")[2] for path, module in model.named_modules()}
    found = {"embedding": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    return {key: paths[id(module)] for key, module in found.items() if id(module) in paths}


def stock_classes(model_type: str) -> tuple[str, dict[str, str]]:
    """Return a type's family and the names of its classes; raises UnfitError for a type of no family."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    classified = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    found: dict[str, Any] = {"base": auto.MODEL_MAPPING_NAMES.get(model_type)}
    if model_type in (*SMALL, *UNOPENED):
        name = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
        return VISION_LANGUAGE.name, {"base": str(found["base"]), "vision_language_model": name}
    is_composite = bool(transformers.CONFIG_MAPPING[model_type].sub_configs)
    if model_type in (targets := auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) and not is_composite:
        family = "encoder_decoder"
        found["seq2seq_model"] = targets[model_type]
    elif model_type in (masked := auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) and not is_composite:
        family = "encoder"
        found |= {"masked_model": masked[model_type], "text_classifier": classified}
        found["pretraining"] = auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(model_type)
        if found["pretraining"] == found["masked_model"]:
            del found["pretraining"]
    elif model_type in (causal := auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) and model_type not in _others(auto):
        family = "decoder"
        found |= {
            "language_model": causal[model_type],
            "score_model": classified,
            "value_model": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.get(model_type),
        }
    else:
        raise UnfitError(f"{model_type} is of no family")
    return family, {kind: name for kind, name in found.items() if isinstance(name, str)}


def _others(auto: Any) -> set[str]:
    """Return the types that write text, but are no plain decoders."""
    named = (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return {name for names in named for name in names}


def config_keys(config_class: Any) -> Iterator[tuple[str, tuple[tuple[str, ...], Any]]]:
    """Give the keys that a recipe may have: the kinds of value, and the default."""
    from transformers import PreTrainedConfig

    shared = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    for item in dataclasses.fields(config_class):
        if item.name in shared or item.name in (*FROM_TOKENIZER, *NOT_OFFERED) or item.name.startswith("_"):
            continue
        default = None if item.default is dataclasses.MISSING else item.default
        if not isinstance(default, str | int | float | bool | list | dict | tuple | NoneType):
            default = None
        kinds = _kinds(item.type)
        yield item.name, (tuple(sorted(kinds | ({"null"} if default is None else set()))), default)


def _kinds(annotation: Any) -> set[str]:
    """Return the JSON kinds of an annotation."""
    if isinstance(annotation, str):
        words = set(re.findall(r"[A-Za-z]+", annotation))
        found = {kind for kind in ("int", "float", "bool", "str", "list", "dict") if kind in words}
        return (found | ({"null"} if "None" in words else set())) or {"any"}
    origin = typing.get_origin(annotation)
    if origin in (Union, UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    if origin is Literal:
        return {type(value).__name__ for value in typing.get_args(annotation)}
    plain = origin or annotation
    if plain is NoneType:
        return {"null"}
    if plain in (list, tuple):
        return {"list"}
    if isinstance(plain, type) and issubclass(plain, dict):
        return {"dict"}
    return {plain.__name__} if plain in (int, float, bool, str) else {"any"}


def _required(model_type: str, record: TypeRecord) -> tuple[str, ...]:
    """Return the keys whose default, null, makes no model."""
    needed = []
    for key, (_, default) in record.keys.items():
        if default is None and key in ALWAYS:
            try:
                tiny_model(model_type, record, trained_kind(record.classes), keys={key: None})
            except Exception:
                needed.append(key)
    return tuple(needed)


def to_json(records: Mapping[str, TypeRecord]) -> str:
    """Return the file's content: a line a type."""
    lines = []
    for name, record in sorted(records.items()):
        plain = TypeRecord(family="", classes={})
        content = {key: value for key, value in dataclasses.asdict(record).items() if value != getattr(plain, key)}
        lines.append(f"{json.dumps(name)}: {json.dumps(content, sort_keys=True)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def all_types() -> list[str]:
    """Return every type that is described."""
    from transformers.models.auto import modeling_auto as auto

    names: dict[str, None] = {}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for name in mapping:
            try:
                stock_classes(name)
            except UnfitError:
                continue
            names[name] = None
    return [*names, *SMALL, *UNOPENED]


def main() -> None:
    """Describe the types that are named, or all of them, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    names = parser.parse_args().types or all_types()
    from transformers.utils import logging

    logging.set_verbosity_error()
    known = dict(type_records()) if FILE.exists() else {}
    for name in names:
        try:
            known[name] = describe(name)
        except UnfitError as error:
            known.pop(name, None)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        record = known[name]
        told = (record.cpu_attention, record.packing, record.decoding, record.scale, record.softcap, dict(record.lacks))
        print(name, *told, flush=True)
        written = FILE.with_suffix(".new")
        written.write_text(to_json(known), encoding="utf-8")
        written.replace(FILE)


if __name__ == "__main__":
    main()
