"""Texts with classes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from trainers.data.dataset import NO_LABEL, Contents, Dataset, Fate
from trainers.data.encoding import Encoded, Marked, TextSettings, encode_texts, mark_text
from trainers.data.layouts.arrays import cut_up, text_holds, token_type
from trainers.data.rows import Row


@dataclass(frozen=True)
class Labelled:
    """text_ids [S] with text_offsets [N + 1], labels [N]: places in the set's classes, -1 where it is unknown."""

    name: ClassVar[str] = "labelled"
    version: ClassVar[int] = 2
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["labels"]] = "labels"
    text: TextSettings

    def identity(self) -> dict[str, Any]:
        """Tokens alone."""
        return self.text.identity(self.role)

    def mark(self, row: Row) -> Marked:
        """A text is read; its class stands apart from it."""
        read = mark_text(row).with_end(self.text.tokenization.eos_token)
        return Marked(read.text, [], label=row.columns["label"])

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded]]:
        """Tokenize each text."""
        return encode_texts(rows, self.text)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded]], fate: Fate) -> Contents:
        """Number the classes; long texts lose their end, which stays the end token."""
        length = self.text.sequence_length
        kept: list[np.ndarray] = []
        rows: list[Row] = []
        for row, item in encoded:
            ids = item.ids
            if len(ids) < 2:
                fate.drop("empty", row)
                continue
            if len(ids) > length:
                fate.truncate(row)
                ids = np.concatenate([ids[: length - 1], ids[-1:]])
            kept.append(ids)
            rows.append(row)
        fate.kept = len(kept)
        names = [row.columns["label"] for row in rows]
        classes = sorted({name for name in names if name is not None})
        places = {name: place for place, name in enumerate(classes)}
        arrays = cut_up("text", kept, token_type(self.text))
        tokens, known = len(arrays["text_ids"]), sum(name is not None for name in names)
        return Contents(
            arrays={**arrays, "labels": np.array([places.get(name, NO_LABEL) for name in names], dtype=np.int64)},
            row_ids=[row.id for row in rows],
            holds=text_holds(len(kept), tokens, known, tokens),
            learns_nothing=known == 0,
            classes=classes,
        )

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `LabelledBatch`; fillers have no label."""
        import torch

        from trainers.data.batches import FILLER, LabelledBatch, pad_texts, sample_ids

        labels = [NO_LABEL if row == FILLER else int(dataset.labels_N[row]) for row in rows]
        texts = pad_texts([dataset.cut("text_ids", max(row, 0)) for row in rows], dataset.pad_id)
        return LabelledBatch(texts, torch.tensor(labels), sample_ids(rows))
