"""What is measured of encoders and of encoder-decoders for the table of model types."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import Capability, TypeRecord, type_records
from recipes.stages.lora import Lora
from trainers.data.batches import Seq2SeqBatch
from trainers.data.masking import MaskedBatch
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.encoder_decoder import TargetLosses, start_token
from trainers.models.lora import add_adapter, target_names
from trainers.models.tiny import PAD, VOCABULARY, close, demand_checkpointing, said, tiny_model
from trainers.models.token_losses import MaskedTokenLosses

LENGTHS = (11, 17)
"""Of two rows, longer than every window of a tiny model."""


def _rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def _padded(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def _masks(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def measure_encoder(model_type: str, model: Any, record: TypeRecord) -> TypeRecord:
    """Return the record with what a tiny masked language model showed."""
    rows = _rows()
    try:
        with torch.no_grad():
            wanted = sum(
                nn.functional.cross_entropy(
                    model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0],
                    row,
                    reduction="sum",
                )
                for row in rows
            )
    except Exception as error:
        return replace(record, lacks={"training": said(error)})
    assert isinstance(wanted, Tensor)
    plain = replace(record, packing=None)
    packed = replace(record, packing="bias")
    for tried in _attentions((packed, replace(packed, first_position="after_pad"), plain)):
        batch = _masked_batch(rows, is_packed=tried.packing is not None)
        if _reproduces(model_type, tried, "masked_model", _restoring(batch), wanted):
            break
    else:
        return replace(record, lacks={"training": "what stands after a row changes its outputs"})
    lacks: dict[Capability, str] = {}
    if tried.packing is None:
        lacks["packing"] = "its positions or its masks are those of one row"
    tried = _classifier(model_type, tried, lacks)
    return _learning(model_type, tried, "masked_model", _restoring(batch), lacks)


def _attentions(records: Iterable[TypeRecord]) -> Iterator[TypeRecord]:
    """Give each record with each attention that the type has."""
    for record in records:
        if record.attention == "sdpa":
            yield replace(record, cpu_attention="sdpa")
        yield replace(record, cpu_attention="eager")


def _restoring(batch: MaskedBatch) -> Callable[[Any], Tensor]:
    return lambda model: MaskedTokenLosses(model)(batch)[0]


def _masked_batch(rows: list[Tensor], *, is_packed: bool) -> MaskedBatch:
    """Return every token as a target."""
    if is_packed:
        padding = torch.zeros(5, dtype=torch.long)
        ids = torch.cat([*rows, padding])[None]
        segments = torch.cat([*(torch.full_like(row, i + 1) for i, row in enumerate(rows)), padding])[None]
        positions = torch.cat([*(torch.arange(len(row)) for row in rows), padding])[None]
    else:
        ids, segments = _padded(rows), _masks(rows)
        positions = torch.arange(ids.shape[1])[None] * segments
    return MaskedBatch(
        input_ids_BT=ids, target_ids_BT=ids, segment_ids_BT=segments, position_ids_BT=positions,
        hidden_mask_BT=segments > 0, sample_ids_B=torch.zeros(len(ids), dtype=torch.long),
    )  # fmt: skip


def _classifier(model_type: str, record: TypeRecord, lacks: dict[Capability, str]) -> TypeRecord:
    """Add which modules a classifier of texts has beyond a masked language model."""
    try:
        if "text_classifier" not in record.classes:
            raise ValueError("transformers has no class for sequence classification of this type")
        masked = tiny_model(model_type, record, "masked_model")
        classifier = tiny_model(model_type, record, "text_classifier")
    except Exception as error:
        lacks["classes"] = said(error)
        return record
    known = set(dict(masked.named_parameters()))
    parts: dict[str, None] = {}
    for name in dict(classifier.named_parameters()):
        if name not in known:
            pieces = name.split(".")
            depth = next(
                d for d in range(1, len(pieces)) if not any(k.startswith(".".join(pieces[:d]) + ".") for k in known)
            )
            parts[".".join(pieces[:depth])] = None
    return replace(record, head=tuple(parts))


def measure_encoder_decoder(model_type: str, model: Any, record: TypeRecord) -> TypeRecord:
    """Return the record with what a tiny encoder-decoder showed."""
    fields = {name: getattr(type(model.config), name, None) for name in ("decoder_start_token_id", "pad_token_id")}
    is_pad = fields["decoder_start_token_id"] in (None, fields["pad_token_id"])
    record = replace(record, start="pad" if is_pad else "eos")
    sources, targets = _rows(), _rows((7, 9), seed=2)
    try:
        with torch.no_grad():
            wanted = sum(
                nn.functional.cross_entropy(
                    model(input_ids=source[None], decoder_input_ids=_shifted(model, target)[None]).logits[0],
                    target, reduction="sum",
                )
                for source, target in zip(sources, targets, strict=True)
            )  # fmt: skip
    except Exception as error:
        return replace(record, lacks={"training": said(error)})
    assert isinstance(wanted, Tensor)
    batch = Seq2SeqBatch(
        _padded(sources), _masks(sources).bool(), _padded(targets), _masks(targets).bool(), torch.zeros(2)
    )
    for attention in ("eager", "sdpa") if record.attention == "sdpa" else ("eager",):
        tried = replace(record, cpu_attention=attention)
        if _reproduces(model_type, tried, "seq2seq_model", lambda built: TargetLosses(built)(batch), wanted):
            break
    else:
        return replace(
            record, lacks={"training": "its logits are not a product of the decoder's states and one matrix"}
        )
    lacks: dict[Capability, str] = {}
    built = tiny_model(model_type, tried, "seq2seq_model", tried.cpu_attention)
    try:
        found = generate(
            built, _padded(sources), _masks(sources).bool(), SamplingSettings(6, 1.0, (), PAD, VOCABULARY), None
        ).tokens_BR
        if not torch.equal(found, torch.stack([_written(model, source, 6) for source in sources])):
            raise ValueError("writing a target token by token does not give what its forward gives")
    except Exception as error:
        lacks["generation"] = said(error)
    return _learning(model_type, tried, "seq2seq_model", lambda built: TargetLosses(built)(batch), lacks)


def _shifted(model: Any, target: Tensor) -> Tensor:
    return torch.cat([torch.tensor([start_token(model)]), target[:-1]])


@torch.no_grad()
def _written(model: Any, source: Tensor, length: int) -> Tensor:
    """Return the likeliest target, each token by a separate forward."""
    ids = torch.tensor([[start_token(model)]])
    for _ in range(length):
        logits = model(input_ids=source[None], decoder_input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, 1:]


def _reproduces(
    model_type: str, record: TypeRecord, kind: ModelKind, loss: Callable[[Any], Tensor], wanted: Tensor
) -> bool:
    type_records()[model_type] = record
    try:
        with torch.no_grad():
            return close(loss(tiny_model(model_type, record, kind, record.cpu_attention)), wanted)
    except Exception:
        return False


def _learning(
    model_type: str, record: TypeRecord, kind: ModelKind, loss: Callable[[Any], Tensor], lacks: dict[Capability, str]
) -> TypeRecord:
    """Add which modules take adapters, and whether activations can be recomputed."""
    type_records()[model_type] = replace(record, linears=())
    model = tiny_model(model_type, record, kind, record.cpu_attention)
    names = target_names(model)
    refused = ""
    while names:
        try:
            adapted = tiny_model(model_type, record, kind, record.cpu_attention)
            add_adapter(adapted, Lora(r=2, target_modules=names), seed=0)
            loss(adapted).backward()
            learning = [(key, parameter) for key, parameter in adapted.named_parameters() if parameter.requires_grad]
            unread = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key, part in learning if part.grad is None}
            if unread:
                raise ValueError(f"no gradient reaches adapters on {', '.join(map(repr, sorted(unread)))}")
        except Exception as error:
            refused = said(error)
            named = [name for name in names if f"'{name}'" in str(error)]
            if not named:
                break
            names = [name for name in names if name not in named]
        else:
            record = replace(record, linears=tuple(names))
            break
    if not record.linears:
        lacks["adapters"] = refused
    if not model.supports_gradient_checkpointing:
        lacks["checkpointing"] = "transformers' class does not support it"
        return replace(record, lacks=lacks)
    try:
        demand_checkpointing(lambda: tiny_model(model_type, record, kind, record.cpu_attention), loss)
    except Exception as error:
        lacks["checkpointing"] = said(error)
    return replace(record, lacks=lacks)
