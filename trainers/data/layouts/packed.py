"""Packed sequences: pieces of several rows in each, with their borders; targets are those of responses."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from recipes.stages.answers import ROLES
from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import Encoded, Marked, TextSettings, encode_instructions, encode_texts, mark_instruction
from trainers.data.layouts.arrays import offsets, text_holds, token_type
from trainers.data.packing import best_fit, split_lengths
from trainers.data.rows import Row

PackedRole = Literal["text", "instructions"]


@dataclass(frozen=True)
class Packed:
    """input_ids, segment_ids, loss_mask [N, T], rows with row_offsets [N + 1]: the kept rows that a sequence holds."""

    name: ClassVar[str] = "packed"
    version: ClassVar[int] = 2
    sides: ClassVar[tuple[str, ...]] = ()
    text: TextSettings
    role: PackedRole

    def identity(self) -> dict[str, Any]:
        """Tokens, packing, and of instructions the targets."""
        targets = {"loss_on": self.text.loss_on} if ROLES[self.role].has_turns else {}
        return {**self.text.identity(self.role), "packing": self.text.packing, **targets}

    def mark(self, row: Row) -> Marked:
        """Return a row's text with its targets."""
        marked = mark_instruction(row, self.text.tokenization)
        whole = ROLES[self.role].has_turns and self.text.loss_on == "all"
        return Marked(marked.text, [(0, len(marked.text))], ends=marked.ends) if whole else marked

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded]]:
        """Tokenize texts whole, or conversations with their answers marked."""
        return encode_texts(rows, self.text) if ROLES[self.role].is_plain else encode_instructions(rows, self.text)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded]], fate: Fate) -> Contents:
        """Cut, truncate and pack into sequences; a segment's first token is never a target."""
        length = self.text.sequence_length
        pieces: list[Encoded] = []
        piece_rows: list[int] = []
        row_ids: list[str] = []
        sources: list[str] = []
        for row, item in encoded:
            if len(item) < 2:
                fate.drop("empty", row)
                continue
            if "text" not in row.columns and len(item) > length:
                fate.truncate(row)
                item = item.part(0, length)
            if self.text.loss_on == "all":
                item = Encoded(item.ids, np.ones(len(item), dtype=bool))
            if not item.response[1:].any():
                fate.drop("no_response", row)
                continue
            fate.kept += 1
            fate.split += len(item) > length
            start = 0
            for size in split_lengths(len(item), length):
                if size > 1:
                    pieces.append(item.part(start, start + size))
                    piece_rows.append(len(row_ids))
                    sources.append(row.source)
                start += size
            row_ids.append(row.id)
        return pack(pieces, piece_rows, row_ids, self.text, sources)

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `TokenBatch`; padding goes to the longest sequence, fillers have no targets."""
        from trainers.data.batches import token_batch

        return token_batch(dataset, rows)


def pack(
    pieces: list[Encoded], piece_rows: list[int], row_ids: list[str], settings: TextSettings, sources: list[str]
) -> Contents:
    """Fill sequences with pieces that fit, of one source each; `piece_rows` and `sources` say what each piece is of."""
    length = settings.sequence_length
    lengths = [len(piece) for piece in pieces]
    bins = _bins(lengths, length, sources) if settings.packing else [[number] for number in range(len(pieces))]
    input_ids = np.full((len(bins), length), settings.tokenization.pad_id, dtype=token_type(settings))
    segment_ids = np.zeros((len(bins), length), dtype=np.uint16 if length < 2**16 else np.int32)
    loss_mask = np.zeros((len(bins), length), dtype=bool)
    for sequence, numbers in enumerate(bins):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            end = start + lengths[number]
            input_ids[sequence, start:end] = pieces[number].ids
            segment_ids[sequence, start:end] = segment
            loss_mask[sequence, start + 1 : end] = pieces[number].response[1:]
            start = end
    supervised = int(loss_mask.sum())
    return Contents(
        arrays={
            "input_ids": input_ids,
            "segment_ids": segment_ids,
            "loss_mask": loss_mask,
            "rows": np.asarray([piece_rows[number] for numbers in bins for number in numbers], dtype=np.int64),
            "row_offsets": offsets([len(numbers) for numbers in bins]),
        },
        row_ids=row_ids,
        holds=text_holds(len(bins), sum(lengths), supervised, input_ids.size),
        learns_nothing=supervised == 0,
    )


def _bins(lengths: list[int], length: int, sources: list[str]) -> list[list[int]]:
    """Pack the pieces of each source by themselves, so that a mixture can weigh its sequences."""
    found: list[list[int]] = []
    for source in dict.fromkeys(sources):
        own = [number for number, name in enumerate(sources) if name == source]
        found += [[own[place] for place in places] for places in best_fit([lengths[number] for number in own], length)]
    return found
