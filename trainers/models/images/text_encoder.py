"""A frozen language model that reads captions: its hidden states are what images are conditioned on.

B captions, T tokens, D width of the hidden states.
"""

import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.data.images import missing_captions
from recipes.errors import RequestError, StageError
from recipes.models.architecture import MODEL_TYPES
from recipes.models.type_table import find_record
from recipes.stages.pretrain import CAPTION_READERS, text_encoder_rule
from trainers.data.batches import Texts, pad_texts
from trainers.data.dataset import Dataset
from trainers.data.layouts.arrays import cut_up
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.models.load import longest_input
from trainers.store.hf_loaders import open_model

FOLDERS = ("text_encoder", "tokenizer")
"""Where diffusers' pipelines keep the two."""
EXAMPLES = 64
"""Captions of its data that a model keeps: what it draws where nothing is asked for."""


@dataclass(frozen=True)
class TextStates:
    """Hidden states of captions."""

    hidden_BTD: Tensor
    mask_BT: Tensor
    """True at real tokens."""

    def repeated(self, count: int) -> "TextStates":
        """Every caption's states so many times, one after the other."""
        return TextStates(self.hidden_BTD.repeat_interleave(count, 0), self.mask_BT.repeat_interleave(count, 0))


class TextEncoder:
    """A language model without its head, and its tokenizer; on the CPU until it first reads on another device."""

    def __init__(self, folder: Path, tokenizer_folder: Path) -> None:
        """Open a model folder in transformers' layout; raises RequestError for a family that reads no captions."""
        self._folders = (folder, tokenizer_folder)
        self.tokenization: Tokenization = load_tokenization(tokenizer_folder)
        self._model = _open_backbone(folder)
        self.width = int(self._model.config.hidden_size)
        self.longest = longest_input(folder)
        """Most tokens of a caption; None: any number."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the language model without its head."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def tokenize(self, captions: Sequence[str], names: Sequence[str]) -> list[list[int]]:
        """Tokenize captions with an end token; raises RequestError naming one that is longer than the model reads."""
        eos = self.tokenization.eos_id
        found = []
        for name, ids in zip(names, self.tokenization.encode_batch(captions, special=True), strict=True):
            found.append(ids if ids and ids[-1] == eos else [*ids, eos])
            if self.longest is not None and len(found[-1]) > self.longest:
                raise RequestError(
                    f"{name}: the caption has {len(found[-1])} tokens; the text encoder reads at most {self.longest}"
                )
        return found

    def read(self, captions: Sequence[str]) -> Texts:
        """Tokenize prompts as a batch."""
        rows = self.tokenize(captions, [f"prompt {caption[:60]!r}" for caption in captions])
        return pad_texts([np.array(ids) for ids in rows], self.tokenization.pad_id)

    def without(self, texts: Texts, is_dropped_B: Tensor) -> Texts:
        """Replace captions by the empty one, which is what guidance goes away from."""
        (empty,) = self.tokenize([""], ["the empty caption"])
        ids, mask = texts.input_ids_BT, texts.attention_mask_BT
        missing = max(0, len(empty) - ids.shape[1])
        ids = torch.nn.functional.pad(ids, (0, missing), value=self.tokenization.pad_id)
        mask = torch.nn.functional.pad(mask, (0, missing), value=False)
        row = torch.full((ids.shape[1],), self.tokenization.pad_id, device=ids.device)
        row[: len(empty)] = torch.tensor(empty, device=ids.device)
        is_token = torch.arange(ids.shape[1], device=ids.device) < len(empty)
        where = is_dropped_B[:, None]
        return Texts(torch.where(where, row, ids), torch.where(where, is_token, mask))

    def with_empty(self, texts: Texts) -> Texts:
        """Add as many empty captions after the captions."""
        count = len(texts.input_ids_BT)
        twice = Texts(texts.input_ids_BT.repeat(2, 1), texts.attention_mask_BT.repeat(2, 1))
        return self.without(twice, torch.arange(2 * count, device=twice.input_ids_BT.device) >= count)

    @torch.no_grad()
    def states(self, texts: Texts) -> TextStates:
        """Return the hidden states of the last layer, in fp32."""
        device = texts.input_ids_BT.device
        if next(self._model.parameters()).device != device:
            self._model.to(device)
        mask = texts.attention_mask_BT
        found = self._model(input_ids=texts.input_ids_BT, attention_mask=mask.long()).last_hidden_state
        return TextStates(found.float(), mask)

    def write(self, folder: Path) -> None:
        """Copy model and tokenizer, byte for byte, to where diffusers' pipelines keep them."""
        for name, source in zip(FOLDERS, self._folders, strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for path in _files(source, is_tokenizer=name == "tokenizer"):
                shutil.copyfile(path, folder / name / path.name)


def find_text_encoder(folder: Path) -> TextEncoder | None:
    """Open the text encoder of a drawing model's folder; None: it has none."""
    if not (folder / FOLDERS[0]).is_dir():
        return None
    return TextEncoder(folder / FOLDERS[0], folder / FOLDERS[1])


def read_captions(encoder: TextEncoder, dataset: Dataset) -> Dataset:
    """Return a set with its captions tokenized; raises RequestError for none, for only empty and for too long ones."""
    if not dataset.captions:
        raise RequestError(str(missing_captions("text_encoder")))
    if not any(dataset.captions):
        raise RequestError(f"every caption is empty ({len(dataset)} images)")
    captions = [np.array(ids, dtype=np.int32) for ids in encoder.tokenize(dataset.captions, dataset.row_ids)]
    arrays = {**dataset.arrays, **cut_up("caption", captions, np.int32)}
    return replace(dataset, arrays=arrays, pad_id=encoder.tokenization.pad_id)


def example_captions(dataset: Dataset, rows: Sequence[int]) -> tuple[str, ...]:
    """Return the first different captions of these rows, empty ones left out."""
    found = dict.fromkeys(dataset.captions[row] for row in rows)
    return tuple(caption for caption in found if caption)[:EXAMPLES]


def _open_backbone(folder: Path) -> Any:
    """Open the model without its head by transformers' own class, frozen, in fp32."""
    from transformers import AutoModel
    from transformers.utils import logging

    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type not in MODEL_TYPES:
        raise RequestError(f"text_encoder: a model of type {model_type!r} cannot be one; {CAPTION_READERS} can")
    if (finding := text_encoder_rule(MODEL_TYPES[model_type])) is not None:
        raise RequestError(f"text_encoder: {finding}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options: dict[str, Any] = {"add_pooling_layer": False} if _may_pool(model_type) else {}
    model, info = open_model(AutoModel, folder, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise StageError(f"{folder}: the text encoder's files lack {', '.join(wrong[:8])}")
    return model.eval().requires_grad_(False)


def _may_pool(model_type: str) -> bool:
    """Tell whether a type's backbone has a pooler unless it is told otherwise; files of encoders often lack it."""
    import transformers

    record = find_record(model_type)
    base = None if record is None else getattr(transformers, record.classes.get("base", ""), None)
    return base is not None and "add_pooling_layer" in inspect.signature(base.__init__).parameters


def _files(folder: Path, *, is_tokenizer: bool) -> Iterator[Path]:
    """A model folder's files that belong to the tokenizer, or those of the network."""
    for path in sorted(folder.iterdir()):
        is_text = path.name.startswith(("tokenizer", "special_tokens", "chat_template"))
        is_network = path.name == "config.json" or path.name.startswith("model")
        if path.is_file() and (is_text if is_tokenizer else is_network):
            yield path
