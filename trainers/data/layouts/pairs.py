"""Preference pairs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import (
    Encoded,
    Marked,
    TextSettings,
    chunks,
    encode_marked,
    mark_answer,
    naming,
    render_prompt,
)
from trainers.data.layouts.arrays import response_arrays, text_holds
from trainers.data.rows import Row


@dataclass(frozen=True)
class Pairs:
    """{chosen,rejected}_{ids,response} [S] with {chosen,rejected}_offsets [N + 1]."""

    name: ClassVar[str] = "pairs"
    version: ClassVar[int] = 2
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    role: ClassVar[Literal["preferences"]] = "preferences"
    text: TextSettings

    def identity(self) -> dict[str, Any]:
        """Tokens alone."""
        return self.text.identity(self.role)

    def mark(self, row: Row) -> Marked:
        """The chosen answer after its prompt."""
        return self._mark(row, "chosen")

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded, Encoded]]:
        """Tokenize both answers, each after the prompt; everything after the prompt is the response."""
        for chunk in chunks(rows, self.text):
            marked: list[Marked] = []
            for row in chunk:
                with naming(row):
                    marked += [self._mark(row, side) for side in self.sides]
            encoded = encode_marked(marked, self.text.tokenization)
            yield from zip(chunk, encoded[::2], encoded[1::2], strict=True)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded, Encoded]], fate: Fate) -> Contents:
        """Keep the pairs that fit and differ."""
        kept: list[tuple[Row, Encoded, Encoded]] = []
        for row, chosen, rejected in encoded:
            if not (chosen.response.any() and rejected.response.any()):
                fate.drop("no_response", row)
            elif np.array_equal(chosen.ids, rejected.ids):
                fate.drop("equal_pair", row)
            elif max(len(chosen), len(rejected)) > self.text.sequence_length:
                fate.drop("too_long", row)
            else:
                kept.append((row, chosen, rejected))
        fate.kept = len(kept)
        arrays: dict[str, np.ndarray] = {}
        for side, items in (("chosen", [item[1] for item in kept]), ("rejected", [item[2] for item in kept])):
            arrays |= response_arrays(side, items, self.text)
        tokens = sum(len(arrays[f"{side}_ids"]) for side in self.sides)
        supervised = sum(int(arrays[f"{side}_response"].sum()) for side in self.sides)
        return Contents(
            arrays={**arrays},
            row_ids=[row.id for row, _, _ in kept],
            holds=text_holds(len(kept), tokens, supervised, tokens),
            learns_nothing=not kept,
        )

    def _mark(self, row: Row, side: str) -> Marked:
        prompt = render_prompt(row.columns["prompt"], self.text.tokenization, row.columns.get("tools"))
        return mark_answer(prompt, row.columns[side], self.text.tokenization)

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `PairBatch`."""
        from trainers.data.batches import PairBatch, sample_ids, sequence_batch

        chosen, rejected = (
            sequence_batch(
                [dataset.cut(f"{side}_ids", max(row, 0)) for row in rows],
                [dataset.cut(f"{side}_response", max(row, 0)) for row in rows],
                dataset.pad_id,
            )
            for side in Pairs.sides
        )
        return PairBatch(chosen, rejected, sample_ids(rows))
