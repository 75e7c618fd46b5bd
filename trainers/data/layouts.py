"""The arrays of each form of data set, and the count of what became of the rows."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainers.data.encoding import Encoded
from trainers.data.packing import best_fit, scattered, split_lengths
from trainers.data.rows import Row

NUM_EXAMPLES = 5


@dataclass(frozen=True)
class FormSettings:
    """What the arrays depend on besides the rows."""

    sequence_length: int
    vocab_size: int
    pad_id: int
    packing: bool
    loss_on_all: bool


@dataclass
class Count:
    """Counts rows while a set is built."""

    rows_in: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, row: Row) -> None:
        """Remember the first few rows of a reason."""
        if len(self.examples.setdefault(reason, [])) < NUM_EXAMPLES:
            self.examples[reason].append(row.id)

    def drop(self, reason: str, row: Row) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.note(reason, row)


@dataclass
class Parts:
    """Contents of a data set's files before they are stored."""

    arrays: dict[str, np.ndarray]
    row_ids: list[str]
    tokens: int
    supervised_tokens: int
    sequences: int
    positions: int
    classes: tuple[str, ...] = ()
    records: list[dict[str, Any]] = field(default_factory=list)


def pack(encoded: Iterable[tuple[Row, Encoded]], count: Count, settings: FormSettings) -> Parts:
    """Cut, truncate and pack into sequences; a segment's first token is never a target."""
    length = settings.sequence_length
    pieces: list[Encoded] = []
    piece_rows: list[int] = []
    row_ids: list[str] = []
    for row, item in encoded:
        if len(item) < 2:
            count.drop("empty", row)
            continue
        if "text" not in row.columns and len(item) > length:
            count.truncated += 1
            count.note("truncated", row)
            item = Encoded(item.ids[:length], item.response[:length])
        if settings.loss_on_all:
            item = Encoded(item.ids, np.ones(len(item), dtype=bool))
        if not item.response[1:].any():
            count.drop("no_response", row)
            continue
        count.kept += 1
        count.split += len(item) > length
        start = 0
        for size in split_lengths(len(item), length):
            if size > 1:
                pieces.append(Encoded(item.ids[start : start + size], item.response[start : start + size]))
                piece_rows.append(len(row_ids))
            start += size
        row_ids.append(row.id)
    return lay_out(pieces, piece_rows, row_ids, settings)


def lay_out(pieces: list[Encoded], piece_rows: list[int], row_ids: list[str], settings: FormSettings) -> Parts:
    """Fill sequences with pieces that fit; `piece_rows` says which row each is of."""
    length = settings.sequence_length
    lengths = [len(piece) for piece in pieces]
    bins = best_fit(lengths, length) if settings.packing else [[number] for number in range(len(pieces))]
    input_ids = np.full((len(bins), length), settings.pad_id, dtype=_token_type(settings))
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
    return Parts(
        arrays={
            "input_ids": input_ids,
            "segment_ids": segment_ids,
            "loss_mask": loss_mask,
            "rows": np.asarray([piece_rows[number] for numbers in bins for number in numbers], dtype=np.int64),
            "row_offsets": offsets([len(numbers) for numbers in bins]),
        },
        row_ids=row_ids,
        tokens=sum(lengths),
        supervised_tokens=int(loss_mask.sum()),
        sequences=len(bins),
        positions=input_ids.size,
    )


def stream(encoded: Iterable[tuple[Row, Encoded]], count: Count, settings: FormSettings) -> Parts:
    """Join the texts, each with its end token, in a scattered order."""
    kept: list[tuple[Row, Encoded]] = []
    for row, item in encoded:
        if len(item) < 2:
            count.drop("empty", row)
        else:
            kept.append((row, item))
    count.kept = len(kept)
    order = sorted(range(len(kept)), key=scattered)
    tokens = _flat([kept[number][1].ids for number in order], _token_type(settings))
    is_first = np.zeros(len(tokens), dtype=bool)
    is_first[offsets([len(kept[number][1]) for number in order])[:-1]] = True
    return Parts(
        arrays={"tokens": tokens, "is_first": is_first},
        row_ids=[kept[number][0].id for number in order],
        tokens=len(tokens),
        supervised_tokens=len(tokens) - len(kept),
        sequences=max(len(tokens) // settings.sequence_length, min(len(kept), 1)),
        positions=len(tokens),
    )


def labelled(encoded: Iterable[tuple[Row, Encoded]], count: Count, settings: FormSettings) -> Parts:
    """Keep texts with their classes; long ones lose their end, which stays the end token."""
    kept: list[np.ndarray] = []
    names: list[str | None] = []
    row_ids: list[str] = []
    for row, item in encoded:
        ids = item.ids
        if len(ids) < 2:
            count.drop("empty", row)
            continue
        if len(ids) > settings.sequence_length:
            count.truncated += 1
            count.note("truncated", row)
            ids = np.concatenate([ids[: settings.sequence_length - 1], ids[-1:]])
        kept.append(ids)
        names.append(row.columns["label"])
        row_ids.append(row.id)
    count.kept = len(kept)
    classes = sorted({name for name in names if name is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    flat = _flat(kept, _token_type(settings))
    return Parts(
        arrays={
            "text_ids": flat,
            "text_offsets": offsets([len(ids) for ids in kept]),
            "labels": np.array([-1 if name is None else numbers[name] for name in names], dtype=np.int64),
        },
        row_ids=row_ids,
        tokens=len(flat),
        supervised_tokens=sum(name is not None for name in names),
        sequences=len(kept),
        positions=len(flat),
        classes=tuple(classes),
    )


def seq2seq(encoded: Iterable[tuple[Row, np.ndarray, np.ndarray]], count: Count, settings: FormSettings) -> Parts:
    """Keep the sources and targets that fit."""
    kept: list[tuple[Row, np.ndarray, np.ndarray]] = []
    for row, source, target in encoded:
        if len(source) < 2 or len(target) < 2:
            count.drop("empty", row)
        elif max(len(source), len(target)) > settings.sequence_length:
            count.drop("too_long", row)
        else:
            kept.append((row, source, target))
    count.kept = len(kept)
    arrays: dict[str, np.ndarray] = {}
    for side, items in (("source", [item[1] for item in kept]), ("target", [item[2] for item in kept])):
        arrays[f"{side}_ids"] = _flat(items, _token_type(settings))
        arrays[f"{side}_offsets"] = offsets([len(ids) for ids in items])
    texts = [row.columns["completion"].encode() for row, _, _ in kept]
    arrays["target_text"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    arrays["target_text_offsets"] = offsets([len(text) for text in texts])
    tokens = len(arrays["source_ids"]) + len(arrays["target_ids"])
    return Parts(
        arrays=arrays,
        row_ids=[row.id for row, _, _ in kept],
        tokens=tokens,
        supervised_tokens=len(arrays["target_ids"]),
        sequences=len(kept),
        positions=tokens,
    )


def pair(encoded: Iterable[tuple[Row, Encoded, Encoded]], count: Count, settings: FormSettings) -> Parts:
    """Keep the pairs that fit and differ."""
    kept: list[tuple[Row, Encoded, Encoded]] = []
    for row, chosen, rejected in encoded:
        if not (chosen.response.any() and rejected.response.any()):
            count.drop("no_response", row)
        elif np.array_equal(chosen.ids, rejected.ids):
            count.drop("equal_pair", row)
        elif max(len(chosen), len(rejected)) > settings.sequence_length:
            count.drop("too_long", row)
        else:
            kept.append((row, chosen, rejected))
    count.kept = len(kept)
    arrays: dict[str, np.ndarray] = {}
    for side, items in (("chosen", [item[1] for item in kept]), ("rejected", [item[2] for item in kept])):
        arrays[f"{side}_ids"] = _flat([item.ids for item in items], _token_type(settings))
        arrays[f"{side}_response"] = _flat([item.response for item in items], np.bool_)
        arrays[f"{side}_offsets"] = offsets([len(item) for item in items])
    tokens = sum(len(chosen) + len(rejected) for _, chosen, rejected in kept)
    return Parts(
        arrays=arrays,
        row_ids=[row.id for row, _, _ in kept],
        tokens=tokens,
        supervised_tokens=int(arrays["chosen_response"].sum() + arrays["rejected_response"].sum()),
        sequences=len(kept),
        positions=tokens,
    )


def prompts(encoded: Iterable[tuple[Row, str, np.ndarray]], count: Count, settings: FormSettings) -> Parts:
    """Keep the prompts that fit, with a record of each."""
    kept: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    for row, text, ids in encoded:
        if len(ids) == 0:
            count.drop("empty", row)
        elif len(ids) > settings.sequence_length:
            count.drop("too_long", row)
        else:
            kept.append(ids)
            reference = row.columns.get("reference")
            records.append({"id": row.id, "text": text, "prompt": row.columns["prompt"], "reference": reference})
    count.kept = len(kept)
    flat = _flat(kept, _token_type(settings))
    return Parts(
        arrays={"prompt_ids": flat, "prompt_offsets": offsets([len(ids) for ids in kept])},
        row_ids=[record["id"] for record in records],
        tokens=len(flat),
        supervised_tokens=0,
        sequences=len(kept),
        positions=len(flat),
        records=records,
    )


def _token_type(settings: FormSettings) -> type[np.generic]:
    return np.uint16 if settings.vocab_size <= 2**16 else np.int32


def _flat(items: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(items).astype(dtype) if items else np.zeros(0, dtype=dtype)


def offsets(lengths: list[int]) -> np.ndarray:
    """Return where each of so many items starts, and where the last ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
