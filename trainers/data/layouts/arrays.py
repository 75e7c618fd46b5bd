"""What layouts share: texts of any length in one array with the places where they start, and what sets of text hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainers.data.dataset import Contents
from trainers.data.encoding import Encoded, TextSettings


def token_type(settings: TextSettings) -> type[np.generic]:
    """Return the smallest type that holds every token id."""
    return np.uint16 if settings.tokenization.vocab_size <= 2**16 else np.int32


def flat(items: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """Return all items one after the other."""
    return np.concatenate(items).astype(dtype) if items else np.zeros(0, dtype=dtype)


def offsets(lengths: Sequence[int]) -> np.ndarray:
    """Return where each of so many items starts, and where the last ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def cut_up(name: str, items: Sequence[np.ndarray], dtype: type[np.generic]) -> dict[str, np.ndarray]:
    """Return the arrays `{name}_ids` and `{name}_offsets` of tokenized texts."""
    return {f"{name}_ids": flat(items, dtype), f"{name}_offsets": offsets([len(item) for item in items])}


def response_arrays(name: str, items: Sequence[Encoded], settings: TextSettings) -> dict[str, np.ndarray]:
    """Return the arrays `{name}_ids`, `{name}_offsets` and `{name}_response` of texts and what of them is response."""
    arrays = cut_up(name, [item.ids for item in items], token_type(settings))
    return {**arrays, f"{name}_response": flat([item.response for item in items], np.bool_)}


def text_holds(sequences: int, tokens: int, supervised_tokens: int, positions: int) -> dict[str, int | float]:
    """Return what a set of text reports that it holds."""
    counts = {"sequences": sequences, "tokens": tokens, "supervised_tokens": supervised_tokens}
    return {**counts, "fill": tokens / max(positions, 1)}


def recorded_texts(
    name: str, kept: Sequence[np.ndarray], records: list[dict[str, Any]], settings: TextSettings
) -> Contents:
    """Return what a set holds of texts that are read and not learnt from, with a record of each."""
    arrays = cut_up(name, kept, token_type(settings))
    tokens = len(arrays[f"{name}_ids"])
    return Contents(
        arrays={**arrays},
        row_ids=[record["id"] for record in records],
        holds=text_holds(len(kept), tokens, 0, tokens),
        learns_nothing=not kept,
        records=records,
    )
