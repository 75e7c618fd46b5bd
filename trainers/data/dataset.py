"""A materialised data set as it is read: memory-mapped arrays and what became of the rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Form = Literal["packed", "image_text", "stream", "labelled", "seq2seq", "pairs", "prompts"]

WARN_LOST = 0.1
"""Share of the rows above which their loss is a warning."""


@dataclass(frozen=True)
class BuildReport:
    """What became of the rows."""

    rows_in: int
    """Rows read, after hold_out, part and limit."""
    kept: int
    truncated: int
    """Conversations cut at the sequence length."""
    split: int
    """Texts cut into several pieces."""
    dropped: dict[str, int]
    """Reason -> rows: empty, no_response, equal_pair, too_long."""
    examples: dict[str, list[str]]
    """Reason -> ids of the first few such rows."""
    sequences: int
    """Rows of the data set: packed sequences, sequences of a stream, pairs or prompts."""
    tokens: int
    supervised_tokens: int
    fill: float
    """Share of the positions that hold real tokens."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        return asdict(self)

    def lost(self, sequence_length: int) -> list[str]:
        """Say which rows were dropped or truncated, why, and for example which; nothing where none were."""
        said = []
        dropped = sum(self.dropped.values())
        if dropped:
            reasons = [f"{count:,} {_reason(name, sequence_length)}" for name, count in self.dropped.items()]
            said.append(f"{self._share(dropped)} dropped: {', '.join(reasons)}; {self._for_example(self.dropped)}")
        if self.truncated:
            example = self._for_example(["truncated"])
            said.append(f"{self._share(self.truncated)} truncated to {sequence_length} tokens; {example}")
        return said

    def _share(self, count: int) -> str:
        return f"{count:,} of {self.rows_in:,} rows ({count / max(self.rows_in, 1):.0%})"

    def _for_example(self, reasons: Iterable[str]) -> str:
        return "for example " + ", ".join([name for reason in reasons for name in self.examples.get(reason, [])][:3])


def _reason(name: str, sequence_length: int) -> str:
    return {
        "empty": "empty",
        "no_response": f"without a response in {sequence_length} tokens",
        "equal_pair": "with equal answers",
        "too_long": f"longer than {sequence_length} tokens",
    }.get(name, name)


@dataclass(frozen=True)
class Dataset:
    """A materialised data set; the arrays are read-only and memory-mapped.

    N sequences of T positions, S tokens in all. packed: input_ids, segment_ids, loss_mask [N, T], rows and row_offsets.
    image-text: the same, and images [P, C, H, W] of 8 bits, of which a sequence has those in image_numbers between
    two of image_offsets [N + 1], in the order of its image tokens; pixel_factor, pixel_mean and pixel_std scale them.
    stream: tokens and is_first (True at a document's first token) [S], documents in a scattered order.
    labelled: text_ids [S] with text_offsets [N + 1], labels [N] (number in `classes`, -1 where it is unknown).
    seq2seq: {source,target}_ids [S] with {source,target}_offsets [N + 1]; target_text, UTF-8 bytes, with
    target_text_offsets [N + 1].
    pairs: {chosen,rejected}_{ids,response} [S] with {chosen,rejected}_offsets [N + 1]. prompts: prompt_ids [S] with
    prompt_offsets [N + 1].
    """

    digest: str
    form: Form
    report: BuildReport
    arrays: Mapping[str, np.ndarray]
    pad_id: int
    records: list[dict[str, Any]] = field(default_factory=list)
    """prompts only, per row: id, text (rendered prompt), prompt (text or messages), reference (good answer or None)."""
    classes: tuple[str, ...] = ()
    """labelled only: names of the classes, sorted."""
    row_ids_path: Path | None = None

    def __len__(self) -> int:
        """Return the number of rows: packed sequences, pairs or prompts."""
        return self.report.sequences

    def prompt_ids(self, row: int) -> np.ndarray:
        """Return the tokens of a prompt."""
        offsets = self.arrays["prompt_offsets"]
        return self.arrays["prompt_ids"][offsets[row] : offsets[row + 1]]

    def image_numbers(self, sequence: int) -> np.ndarray:
        """Return the numbers of a sequence's images."""
        offsets = self.arrays["image_offsets"]
        return self.arrays["image_numbers"][offsets[sequence] : offsets[sequence + 1]]

    def text_ids(self, row: int) -> np.ndarray:
        """Return the tokens of a labelled text."""
        offsets = self.arrays["text_offsets"]
        return self.arrays["text_ids"][offsets[row] : offsets[row + 1]]

    def side_ids(self, side: Literal["source", "target"], row: int) -> np.ndarray:
        """Return the tokens of a source or of its target."""
        offsets = self.arrays[f"{side}_offsets"]
        return self.arrays[f"{side}_ids"][offsets[row] : offsets[row + 1]]

    def target_text(self, row: int) -> str:
        """Return a target as the data has it."""
        offsets = self.arrays["target_text_offsets"]
        return bytes(self.arrays["target_text"][offsets[row] : offsets[row + 1]]).decode()

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each packed sequence, else of the longer side of each pair."""
        if self.form == "packed":
            return [int(length) for length in (self.arrays["segment_ids"][list(rows)] > 0).sum(axis=1)]
        names = ("source", "target") if self.form == "seq2seq" else ("chosen", "rejected")
        sides = [self.arrays[f"{name}_offsets"] for name in names]
        return [max(int(offsets[row + 1] - offsets[row]) for offsets in sides) for row in rows]

    def row_ids(self, sequence: int) -> list[str]:
        """Return the ids of the source rows in a sequence, pair or prompt; what an error message names."""
        if self.row_ids_path is None:
            return []
        names = self.row_ids_path.read_text(encoding="utf-8").split("\n")
        if self.form == "stream":
            return []
        if self.form not in ("packed", "image_text"):
            return [names[sequence]]
        offsets = self.arrays["row_offsets"]
        return [names[row] for row in self.arrays["rows"][offsets[sequence] : offsets[sequence + 1]]]
