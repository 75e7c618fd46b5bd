"""One stream of tokens that recurrent models read on in."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np

from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import Encoded, Marked, TextSettings, encode_texts, mark_text
from trainers.data.layouts.arrays import flat, offsets, text_holds, token_type
from trainers.data.packing import scattered
from trainers.data.rows import Row


@dataclass(frozen=True)
class Stream:
    """tokens and is_first (True at a text's first token) [S], the texts in a scattered order, each with its end."""

    name: ClassVar[str] = "stream"
    version: ClassVar[int] = 1
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["text"]] = "text"
    text: TextSettings

    def identity(self) -> dict[str, Any]:
        """Tokens alone."""
        return {**self.text.identity(self.role), "form": "stream"}

    def mark(self, row: Row) -> Marked:
        """All of a text is learnt."""
        return mark_text(row)

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded]]:
        """Tokenize each text."""
        return encode_texts(rows, self.text)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded]], fate: Fate) -> Contents:
        """Join the texts."""
        kept: list[tuple[Row, Encoded]] = []
        for row, item in encoded:
            if len(item) < 2:
                fate.drop("empty", row)
            else:
                kept.append((row, item))
        fate.kept = len(kept)
        ordered = [kept[number] for number in sorted(range(len(kept)), key=scattered)]
        tokens = flat([item.ids for _, item in ordered], token_type(self.text))
        is_first = np.zeros(len(tokens), dtype=bool)
        is_first[offsets([len(item) for _, item in ordered])[:-1]] = True
        sequences = max(len(tokens) // self.text.sequence_length, min(len(kept), 1))
        return Contents(
            arrays={"tokens": tokens, "is_first": is_first},
            row_ids=[row.id for row, _ in ordered],
            holds=text_holds(sequences, len(tokens), len(tokens) - len(kept), len(tokens)),
            learns_nothing=not kept,
        )

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> NoReturn:
        """A stream has lanes, not rows: `trainers.data.streams`."""
        raise ValueError("a stream is read in lanes; it has no batches of rows")
