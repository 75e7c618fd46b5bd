"""What is measured of causal language models for the table of model types."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import Capability, TypeRecord, type_records, vllm_lack
from recipes.stages.lora import NEW_HEADS, Lora
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.attention import attention_name
from trainers.models.forward_forms import head_logits
from trainers.models.lora import add_adapter, target_names
from trainers.models.tiny import PAD, VOCABULARY, close, demand_checkpointing, said, tiny_model
from trainers.models.token_losses import hidden_states

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
TEXTS = (11, 17)
"""Lengths of two rows, longer than every window of a tiny model."""
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that peft reads as experts' in types where transformers fuses these; adapters on them are not merged here."""


def measure_decoder(model_type: str, model: Any, record: TypeRecord) -> TypeRecord:
    """Return the record with what a tiny causal language model showed."""
    return _Probe(model_type, model).describe(record)


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
        """Return the likeliest continuations, each token by a separate forward."""
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
            demand_checkpointing(lambda: tiny_model(self._type, record, attention=record.cpu_attention), self._loss)
        except Exception as error:
            self._lacks["checkpointing"] = said(error)

    def _heads(self, record: TypeRecord) -> None:
        heads_of: tuple[tuple[ModelKind, Capability, str], ...] = (
            ("score_model", "reward_model", "sequence classification"),
            ("value_model", "critic", "token classification"),
        )
        for kind, capability, name in heads_of:
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
