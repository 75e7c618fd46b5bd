"""What vision-language models of a type can do, measured on small ones of random weights: see `describe`."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.models.type_table import Capability, TypeRecord, type_records
from recipes.stages.lora import Lora
from trainers.data.batches import ImageTextBatch, TokenBatch
from trainers.data.image_inputs import joined
from trainers.data.image_processor import ImageProcessor, load_image_processor
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.attention import attention_name
from trainers.models.forward_forms import head_logits, image_arguments
from trainers.models.lora import add_adapter, target_names
from trainers.models.small_vision import small_model, write_small_processor
from trainers.models.tiny import close, demand_checkpointing, said
from trainers.models.vision_language import image_text_hidden_states

TEXTS = (7, 12)
"""Tokens after the image of two rows."""
CAPABILITIES: dict[Capability, str] = {
    "reward_model": "transformers has no class of it with a head for scores",
    "critic": "transformers has no class of it with a head for values",
}
UNOPENED = {
    "smolvlm": "transformers' processor of it does not open without its part for videos, which needs torchvision, and "
    "the package num2words"
}
"""Types that are refused by name, and why."""


def measure_vision(model_type: str, record: TypeRecord) -> TypeRecord:
    """Return the record with what was measured."""
    if model_type in UNOPENED:
        return replace(record, packing=None, decoding=None, lacks={"training": UNOPENED[model_type]})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = write_small_processor(folder, model_type, ["a small text about an image"] * 3)
        return _Probe(model_type, config, load_image_processor(folder)).describe(record)


class _Probe:
    """A small model, and what its stock class says of two rows with an image each."""

    def __init__(self, model_type: str, config: Any, processor: ImageProcessor) -> None:
        self._type = model_type
        self._config = config
        self._processor = processor
        generator = torch.Generator().manual_seed(1)
        image = torch.from_numpy(self._processor.sample.ids.astype(np.int64))
        texts = [torch.randint(20, 200, (length,), generator=generator) for length in TEXTS]
        self._rows = [torch.cat([text[:2], image, text[2:]]) for text in texts]
        self._lacks: dict[Capability, str] = dict(CAPABILITIES)

    def _images(self, count: int) -> dict[str, Tensor]:
        found = joined([self._processor.sample.arrays] * count)
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def _stock(self, model: Any, row: Tensor) -> Tensor:
        given = image_arguments(model, row[None], self._images(1))
        mask = torch.ones_like(row[None])
        logits: Tensor = model(input_ids=row[None], attention_mask=mask, use_cache=False, **given).logits[0]
        return logits

    def describe(self, record: TypeRecord) -> TypeRecord:
        """Measure."""
        try:
            self._model = small_model(self._config, attention="eager").eval()
            with torch.no_grad():
                self._logits = [self._stock(self._model, row) for row in self._rows]
        except Exception as error:
            return replace(record, packing=None, decoding=None, lacks={"training": said(error)})
        attention_name(torch.device("cpu"))  # makes it known to transformers
        for tried, compute in (
            (replace(record, packing="bias"), self._packed),
            (replace(record, packing=None), self._padded),
            (replace(record, packing=None, cpu_attention="sdpa"), self._padded),
        ):
            if self._agrees(tried, compute):
                record = tried
                break
        else:
            return replace(
                record, packing=None, decoding=None, lacks={"training": "rows in a batch differ from rows alone"}
            )
        if record.packing is None:
            self._lacks["packing"] = "tokens of images have positions that are not counted by row of a sequence"
        record = self._decoding(record)
        record = self._adapters(record)
        self._checkpointing(record)
        self._lacks["vllm"] = "rollouts with images are not sampled"
        return replace(record, lacks=dict(self._lacks))

    def _agrees(self, record: TypeRecord, compute: Callable[[], list[Tensor]]) -> bool:
        type_records()[self._type] = record
        kinds = {"text_config": record.cpu_attention, "vision_config": "sdpa", "": "sdpa"}
        try:
            self._model = small_model(self._config, attention=kinds).eval()
            with torch.no_grad():
                found = compute()
        except Exception:
            return False
        return all(close(ours, theirs) for ours, theirs in zip(found, self._logits, strict=True))

    def _batch(self, packed: bool) -> ImageTextBatch:
        if packed:
            ids = torch.cat(self._rows)[None]
            segments = torch.cat([torch.full_like(row, number + 1) for number, row in enumerate(self._rows)])[None]
            positions = torch.cat([torch.arange(len(row)) for row in self._rows])[None]
        else:
            ids = nn.utils.rnn.pad_sequence(self._rows, batch_first=True)
            segments = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in self._rows], batch_first=True)
            positions = torch.arange(ids.shape[1])[None] * segments
        tokens = TokenBatch(ids, segments, positions, (segments > 0) & (positions > 0), torch.arange(len(ids)))
        return ImageTextBatch(tokens, self._images(len(self._rows)))

    def _packed(self) -> list[Tensor]:
        logits = head_logits(self._model, image_text_hidden_states(self._model, self._batch(packed=True))[0])
        return list(logits.split([len(row) for row in self._rows]))

    def _padded(self) -> list[Tensor]:
        logits = head_logits(self._model, image_text_hidden_states(self._model, self._batch(packed=False)))
        return [row[: len(ids)] for row, ids in zip(logits, self._rows, strict=True)]

    def _decoding(self, record: TypeRecord) -> TypeRecord:
        length, width = 5, max(map(len, self._rows))
        wanted = torch.stack([self._continued(row, length) for row in self._rows])
        ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in self._rows])
        mask = torch.stack([torch.arange(width) >= width - len(row) for row in self._rows])
        settings = SamplingSettings(length, 1.0, (), 0, self._config.get_text_config().vocab_size)
        for form in ("positions", "bias"):
            type_records()[self._type] = tried = replace(record, decoding=form)
            try:
                found = generate(self._model, ids, mask, settings, None, self._images(len(ids))).tokens_BR
            except Exception as error:
                self._lacks["generation"] = said(error)
                continue
            if torch.equal(found, wanted):
                self._lacks.pop("generation", None)
                return tried
        self._lacks.setdefault("generation", "continuing a prompt token by token does not give what its forward gives")
        return replace(record, decoding=None)

    @torch.no_grad()
    def _continued(self, row: Tensor, length: int) -> Tensor:
        """Return the likeliest continuation, each token by a forward."""
        ids = row
        for _ in range(length):
            ids = torch.cat([ids, self._stock(self._model, ids)[-1:].argmax(-1)])
        return ids[len(row) :]

    def _loss(self, model: Any) -> Tensor:
        batch = self._batch(packed=record_packs(self._type))
        logits = head_logits(model, image_text_hidden_states(model, batch))
        mask = batch.tokens.loss_mask_BT[:, 1:]
        return nn.functional.cross_entropy(logits[:, :-1][mask], batch.tokens.input_ids_BT[:, 1:][mask])

    def _adapters(self, record: TypeRecord) -> TypeRecord:
        type_records()[self._type] = replace(record, linears=())
        names = target_names(self._model)
        try:
            model = small_model(self._config)
            add_adapter(model, Lora(r=2, target_modules=names), seed=0)
            self._loss(model).backward()
            learning = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
            if unread := sorted(key for key, parameter in learning if parameter.grad is None):
                raise ValueError(f"no gradient reaches {unread[0]}")
        except Exception as error:
            self._lacks["adapters"] = said(error)
            return record
        return replace(record, linears=tuple(names))

    def _checkpointing(self, record: TypeRecord) -> None:
        type_records()[self._type] = record
        try:
            demand_checkpointing(lambda: small_model(self._config), self._loss)
        except Exception as error:
            self._lacks["checkpointing"] = said(error)


def record_packs(model_type: str) -> bool:
    """Tell whether several rows of a type share a sequence."""
    return type_records()[model_type].packing is not None
