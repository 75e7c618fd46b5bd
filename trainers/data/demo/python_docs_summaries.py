"""Summaries from the documentation: a docstring without its first sentence, and that sentence as its target.

What makes the first sentence of a text its summary is the design of XSum (Narayan et al. 2018).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

from recipes.data.text import Split
from trainers.data.demo.prose import CopyIndex, body, summary, words
from trainers.data.demo.python_docs import Entry, python_docs_digest
from trainers.data.demo.python_docs_sets import signature, split_of

VERSION = 1
"""Raised when the same entries give other rows."""

MIN_WORDS, MAX_WORDS = 12, 100
"""Of a text to be summed up; of longer ones the beginning is kept, up to the end of a paragraph."""


def summaries_digest() -> str:
    """Return 64 hex digits over the documented files and how the rows are made of them."""
    return hashlib.sha256(f"summaries {VERSION} {python_docs_digest()}".encode()).hexdigest()


def build_summaries(entries: Sequence[Entry]) -> dict[str, bytes]:
    """Make the rows of every split as JSON lines, by file name; equal entries give equal bytes.

    What copies a held-out summary or paragraph is left out, as in the other sets.
    """
    files: dict[str, bytes] = {}
    held_out: list[str] = []
    splits: tuple[Split, ...] = ("test", "validation", "train")
    for split in splits:
        index = CopyIndex(held_out)
        rows = list(_rows((entry for entry in entries if split_of(entry) == split), index))
        for row in rows:
            _, *paragraphs = row["prompt"].split("\n\n")
            held_out += [row["completion"], *paragraphs]
        files[f"summaries.{split}.jsonl"] = b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows)
    return files


def _rows(entries: Iterable[Entry], held_out: CopyIndex) -> Iterable[dict[str, str]]:
    """Yield each distinct text below its signature, with its summary; paragraphs that repeat it are left out."""
    seen: set[str] = set()
    for entry in entries:
        target = None if entry.kind == "topic" else summary(entry.doc)
        if target is None or held_out.has_near_copy(target):
            continue
        repeats = CopyIndex([target])
        kept = [
            block
            for block in body(entry.doc)
            if words(block) and not held_out.has_near_copy(block) and not repeats.has_near_copy(block)
        ]
        text = "\n\n".join(_beginning(kept))
        if len(text.split()) >= MIN_WORDS and text not in seen:
            seen.add(text)
            yield {"id": entry.name, "prompt": f"{signature(entry)}\n\n{text}", "completion": target}


def _beginning(blocks: Sequence[str]) -> list[str]:
    """Keep whole paragraphs up to MAX_WORDS."""
    kept: list[str] = []
    count = 0
    for block in blocks:
        count += len(block.split())
        if count > MAX_WORDS:
            break
        kept.append(block)
    return kept
