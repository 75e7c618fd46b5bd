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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn

from recipes.models.type_table import FILE, Capability, TypeRecord, trained_kind, type_records, vllm_lack
from recipes.stages.lora import NEW_HEADS, Lora
from trainers.inference.describe_encoders import measure_encoder, measure_encoder_decoder
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.attention import attention_name
from trainers.models.forward_forms import head_logits
from trainers.models.lora import add_adapter, target_names
from trainers.models.tiny import ALWAYS, PAD, VOCABULARY, close, said, tiny_model
from trainers.models.token_losses import hidden_states

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
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
TEXTS = (11, 17)
"""Lengths of two rows, longer than every window of a tiny model."""
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that peft reads as experts' in types where transformers fuses these; adapters on them are not merged here."""


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
    shape = {what: name for what, names in SHAPE_KEYS.items() if (name := next((n for n in names if n in keys), None))}
    record = TypeRecord(family=family, classes=classes, keys=keys, shape=shape)
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
    return _Probe(model_type, model).describe(record)


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


class _Probe:
    """A tiny model, and what its stock class says of two rows."""

    def __init__(self, model_type: str, model: Any) -> None:
        self._type = model_type
        self._model = model
        self._models = {"eager": model}
        """By their attention; some types take it when they are built and never again."""
        generator = torch.Generator().manual_seed(1)
        self._rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in TEXTS]
        self._lacks: dict[Capability, str] = {}

    def describe(self, record: TypeRecord) -> TypeRecord:
        """Measure."""
        try:
            with torch.no_grad():
                self._logits = [self._model(input_ids=row[None], use_cache=False).logits[0] for row in self._rows]
        except Exception as error:
            return replace(record, packing=None, decoding=None, lacks={"training": said(error)})
        record = self._head(record)
        record = self._packing(record)
        if "training" not in self._lacks:
            record = self._decoding(record)
            record = self._adapters(record)
            self._checkpointing(record)
            self._heads(record)
            if (lack := vllm_lack(self._type, record.classes)) is not None:
                self._lacks["vllm"] = lack
        return replace(record, lacks=dict(self._lacks))

    def _head(self, record: TypeRecord) -> TypeRecord:
        config = self._model.config
        scales = [None, *((key, power) for key in SCALES if getattr(config, key, None) for power in (1, -1))]
        caps = [None, *(key for key in SOFTCAPS if getattr(config, key, None))]
        for scale in scales:
            for cap in caps:
                tried = replace(record, scale=scale, softcap=cap)
                if self._agrees(tried, self._plain):
                    return tried
        self._lacks["training"] = "its logits are not a product of the last hidden states and one matrix"
        return record

    def _packing(self, record: TypeRecord) -> TypeRecord:
        if "training" in self._lacks:
            return replace(record, packing=None, decoding=None)
        attentions = [attention_name(torch.device("cpu")), *(("sdpa",) if record.attention == "sdpa" else ()), "eager"]
        for form in ("bias", "positions", "kinds"):
            for attention in attentions:
                tried = replace(record, packing=form, cpu_attention=attention)
                if self._agrees(tried, self._packed, attention):
                    return tried
        self._lacks["packing"] = "its state or its positions do not restart with each row of a packed sequence"
        for attention in attentions:
            tried = replace(record, packing=None, cpu_attention=attention)
            if self._agrees(tried, self._padded, attention):
                return tried
        self._lacks["training"] = "what stands after a row changes its outputs"
        return replace(record, packing=None, decoding=None)

    def _agrees(self, record: TypeRecord, compute: Callable[[], list[Tensor]], attention: str = "eager") -> bool:
        type_records()[self._type] = record
        try:
            if attention not in self._models:
                self._models[attention] = tiny_model(self._type, record, attention=attention)
            self._model = self._models[attention]
            with torch.no_grad():
                found = compute()
        except Exception:
            return False
        return all(close(ours, theirs) for ours, theirs in zip(found, self._logits, strict=True))

    def _plain(self) -> list[Tensor]:
        states = [self._model.base_model(input_ids=row[None], use_cache=False).last_hidden_state for row in self._rows]
        return [head_logits(self._model, state[0]) for state in states]

    def _packed(self) -> list[Tensor]:
        padding = 5
        ids = torch.cat([*self._rows, torch.full((padding,), PAD)])[None]
        segments = torch.cat([torch.full((n,), i) for n, i in zip((*TEXTS, padding), (1, 2, 0), strict=True)])[None]
        positions = torch.cat([*(torch.arange(n) for n in TEXTS), torch.zeros(padding, dtype=torch.long)])[None]
        logits = head_logits(self._model, hidden_states(self._model, ids, segments, positions)[0])
        return list(logits[: sum(TEXTS)].split(TEXTS))

    def _padded(self) -> list[Tensor]:
        ids = nn.utils.rnn.pad_sequence(self._rows, batch_first=True, padding_value=PAD)
        segments = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in self._rows], batch_first=True)
        positions = torch.arange(ids.shape[1])[None] * segments
        logits = head_logits(self._model, hidden_states(self._model, ids, segments, positions))
        return [row[:n] for row, n in zip(logits, TEXTS, strict=True)]

    def _decoding(self, record: TypeRecord) -> TypeRecord:
        length = 9
        self._model = self._models["eager"]
        wanted = self._continued(length)
        self._model = self._models[record.cpu_attention]
        width = max(TEXTS)
        ids = torch.stack([nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in self._rows])
        mask = torch.stack([torch.arange(width) >= width - len(row) for row in self._rows])
        settings = SamplingSettings(length, 1.0, (), PAD, VOCABULARY)
        for form in ("bias", "mask", "no_cache"):
            type_records()[self._type] = replace(record, decoding=form)
            try:
                found = generate(self._model, ids, mask, settings, None).tokens_BR
            except Exception:
                continue
            if torch.equal(found, wanted):
                return replace(record, decoding=form)
        self._lacks["generation"] = "continuing a prompt token by token does not give what its forward gives"
        return replace(record, decoding=None)

    def _continued(self, length: int) -> Tensor:
        """Return the likeliest continuations, each token by a forward of its own."""
        rows = []
        with torch.no_grad():
            for row in self._rows:
                ids = row[None]
                for _ in range(length):
                    logits = self._model(input_ids=ids, use_cache=False).logits[:, -1]
                    ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
                rows.append(ids[0, len(row) :])
        return torch.stack(rows)

    def _adapters(self, record: TypeRecord) -> TypeRecord:
        type_records()[self._type] = replace(record, linears=())
        names = target_names(self._model)
        refused = ""
        while names:
            try:
                self._adapt(record, names)
            except Exception as error:
                refused = said(error)
                named = [name for name in names if f"'{name}'" in str(error)]
                if not named:
                    break
                names = [name for name in names if name not in named]  # peft cannot put adapters on these
            else:
                return replace(record, linears=tuple(names))
        self._lacks["adapters"] = refused
        return record

    def _adapt(self, record: TypeRecord, names: list[str]) -> None:
        model = tiny_model(self._type, record, attention=record.cpu_attention)
        add_adapter(model, Lora(r=2, target_modules=names), seed=0)
        if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
            listed = ", ".join(map(repr, sorted(set(names) & set(OF_EXPERTS))))
            raise ValueError(f"peft takes {listed} for parameters of experts that are fused")
        self._loss(model).backward()
        learning = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
        unread = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key, parameter in learning if parameter.grad is None}
        if unread:
            raise ValueError(f"no gradient reaches adapters on {', '.join(map(repr, sorted(unread)))}")

    def _loss(self, model: Any) -> Tensor:
        """Return a loss over both rows."""
        ids = nn.utils.rnn.pad_sequence(self._rows, batch_first=True, padding_value=PAD)
        segments = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in self._rows], batch_first=True)
        positions = torch.arange(ids.shape[1])[None] * segments
        logits = head_logits(model, hidden_states(model, ids, segments, positions))
        return nn.functional.cross_entropy(logits[:, :-1][segments[:, 1:] > 0], ids[:, 1:][segments[:, 1:] > 0])

    def _checkpointing(self, record: TypeRecord) -> None:
        if not self._model.supports_gradient_checkpointing:
            self._lacks["checkpointing"] = "transformers' class does not support it"
            return
        try:
            gradients = []
            for checkpointed in (False, True):
                model = tiny_model(self._type, record, attention=record.cpu_attention).train()
                if checkpointed:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                self._loss(model).backward()
                gradients.append([p.grad for p in model.parameters() if p.grad is not None])
            if not all(close(a, b) for a, b in zip(*gradients, strict=True)):
                raise ValueError("with it gradients differ")
        except Exception as error:
            self._lacks["checkpointing"] = said(error)

    def _heads(self, record: TypeRecord) -> None:
        for kind, capability, name in (
            ("score_model", "reward_model", "sequence classification"),
            ("value_model", "critic", "token classification"),
        ):
            try:
                if kind not in record.classes:
                    raise ValueError(f"transformers has no class for {name} of this type")
                model = tiny_model(self._type, record, kind, num_labels=1)
                heads = [head for head in NEW_HEADS if isinstance(getattr(model, head, None), nn.Linear)]
                if not heads:
                    raise ValueError(f"its class for {name} has no linear head of its own")
                if type(model.base_model) is not type(self._model.base_model):
                    raise ValueError(f"its class for {name} has another backbone")
            except Exception as error:
                self._lacks[capability] = said(error)  # type: ignore[index]


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
    return list(names)


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
