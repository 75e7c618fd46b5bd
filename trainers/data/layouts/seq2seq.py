"""Sources and their targets."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import Marked, TextSettings, chunks, encode_plain, naming, render_prompt
from trainers.data.layouts.arrays import cut_up, offsets, text_holds, token_type
from trainers.data.rows import Row

SidesOfRow = tuple[Row, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Seq2Seq:
    """{source,target}_ids [S] with {source,target}_offsets [N + 1]; target_text, UTF-8 bytes, with target_text_offsets
    [N + 1].
    """

    name: ClassVar[str] = "seq2seq"
    version: ClassVar[int] = 1
    sides: ClassVar[tuple[str, ...]] = ("source", "target")
    role: ClassVar[Literal["seq2seq"]] = "seq2seq"
    text: TextSettings

    def identity(self) -> dict[str, Any]:
        """Tokens alone."""
        return self.text.identity(self.role)

    def mark(self, row: Row) -> Marked:
        """A source and its target, each with its end token."""
        source = self._source(row) + self.text.tokenization.eos_token
        text = source + row.columns["completion"]
        return Marked(text, [(len(source), len(text))], ends=True)

    def encode(self, rows: Iterable[Row]) -> Iterator[SidesOfRow]:
        """Tokenize sources as prompts are, and their targets; both end with the end token."""
        tokenization = self.text.tokenization
        for chunk in chunks(rows, self.text):
            texts = []
            for row in chunk:
                with naming(row):
                    texts.append(self._source(row))
            sources = [encoded.ids for encoded in encode_plain(texts, tokenization)]
            written = [row.columns["completion"] for row in chunk]
            targets = [encoded.ids for encoded in encode_plain(written, tokenization)]
            yield from zip(chunk, sources, targets, strict=True)

    def _source(self, row: Row) -> str:
        return render_prompt(row.columns["prompt"], self.text.tokenization, row.columns.get("tools")).text

    def arrays(self, encoded: Iterable[SidesOfRow], fate: Fate) -> Contents:
        """Keep the sources and targets that fit."""
        kept: list[SidesOfRow] = []
        for row, source, target in encoded:
            if len(source) < 2 or len(target) < 2:
                fate.drop("empty", row)
            elif max(len(source), len(target)) > self.text.sequence_length:
                fate.drop("too_long", row)
            else:
                kept.append((row, source, target))
        fate.kept = len(kept)
        dtype = token_type(self.text)
        arrays = cut_up("source", [item[1] for item in kept], dtype) | cut_up(
            "target", [item[2] for item in kept], dtype
        )
        texts = [row.columns["completion"].encode() for row, _, _ in kept]
        arrays["target_text"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        arrays["target_text_offsets"] = offsets([len(text) for text in texts])
        targets = len(arrays["target_ids"])
        tokens = len(arrays["source_ids"]) + targets
        return Contents(
            arrays={**arrays},
            row_ids=[row.id for row, _, _ in kept],
            holds=text_holds(len(kept), tokens, targets, tokens),
            learns_nothing=not kept,
        )

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `Seq2SeqBatch`; fillers have nothing to write."""
        from trainers.data.batches import build_seq2seq_batch, sample_ids

        sources, targets = ([dataset.cut(f"{side}_ids", max(row, 0)) for row in rows] for side in Seq2Seq.sides)
        return build_seq2seq_batch(sources, targets, dataset.pad_id, sample_ids(rows))


def target_text(dataset: Dataset, row: int) -> str:
    """Return a target as the data has it."""
    return dataset.cut("target_text", row).tobytes().decode()
