"""The four sets made from the documentation: text, instructions, preferences and prompts, split by module."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from recipes.data import Split
from trainers.data.prose import CopyIndex, paragraphs, summary, words
from trainers.data.python_docs import Entry

SETS = ("text", "instructions", "preferences", "prompts")
SPLITS: tuple[Split, ...] = get_args(Split)

VALIDATION_SHARE = 0.06
TEST_SHARE = 0.14
SPLIT_SALT = "python-docs split 193"
"""Chosen so that no split is mostly one package, on any Python from 3.11."""

KIN = {
    "pyio": "io",
    "pydecimal": "decimal",
    "pydatetime": "datetime",
    "strptime": "datetime",
    "pylong": "decimal",
    "ntpath": "posixpath",
    "genericpath": "posixpath",
    "collections_abc": "collections",
    "weakrefset": "weakref",
    "sitebuiltins": "site",
    "threading_local": "threading",
    "py_abc": "abc",
    "markupbase": "html",
    "compression": "gzip",
    "distutils": "setuptools",
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "pyrepl": "readline",
}
"""Modules that document the same things; they stand in the same split. Leading underscores are taken off first."""

MAX_PARAMETERS = 5
"""Further parameters of a signature are left out of a prompt."""


def group(entry: Entry) -> str:
    """Return what an entry is split by: its top-level module with its kin, or its topic."""
    if entry.kind == "topic":
        return f"topic {entry.qualname}"
    top = entry.module.split(".")[0].lstrip("_")
    return KIN.get(top, top)


def split_of(entry: Entry) -> Split:
    """Return the split of an entry; a pure function of its group's name."""
    share = _uniform(SPLIT_SALT, group(entry))
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def _draw(*parts: str | int) -> int:
    """Return 64 bits that depend on the parts alone."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8], "big")


def _uniform(*parts: str | int) -> float:
    return _draw(*parts) / 2**64


@dataclass
class DocumentSets:
    """Rows of each set and split, and what was left out."""

    rows: dict[str, dict[str, list[dict[str, Any]]]]
    counts: dict[str, int] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """Serialise, one file of JSON lines a set and split; equal sets give equal bytes."""
        return {
            f"{name}.{split}.jsonl": b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows)
            for name, splits in self.rows.items()
            for split, rows in splits.items()
        }


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prompt and its true answer."""

    entry: Entry
    prompt: str
    answer: str


def build_sets(entries: Sequence[Entry]) -> DocumentSets:
    """Make all sets. Whatever is a near copy of a held-out docstring's paragraph or summary is left out of the training
    sets, and what copies a test one is left out of validation."""
    by_split: dict[Split, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        by_split[split_of(entry)].append(entry)
    sets: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in SETS}
    counts: dict[str, int] = {}
    held_out: list[str] = []
    for split in ("test", "validation", "train"):
        index = CopyIndex(held_out)
        documents, left_out = _documents(by_split[split], index)
        pairs, pairs_left_out = _pairs(by_split[split], index)
        held_out += [block for document in documents for block in document["text"].split("\n\n")[1:]]
        held_out += [pair.answer for pair in pairs]
        sets["text"][split] = documents
        sets["instructions"][split] = [_instruction(pair) for pair in pairs]
        sets["preferences"][split], flawed_left_out = _preferences(pairs, index)
        sets["prompts"][split] = [
            {"id": pair.entry.name, "prompt": _user(pair.prompt), "reference": pair.answer} for pair in pairs
        ]
        counts[f"{split}.entries"] = len(by_split[split])
        counts[f"{split}.copied_paragraphs_left_out"] = left_out
        counts[f"{split}.copied_pairs_left_out"] = pairs_left_out
        counts[f"{split}.copied_flawed_answers_left_out"] = flawed_left_out
        counts |= {f"{split}.{name}": len(sets[name][split]) for name in SETS}
    return DocumentSets(sets, counts)


def signature(entry: Entry) -> str:
    """Return the dotted name with its parameters."""
    if entry.kind not in ("function", "method"):
        return entry.name
    shown = entry.parameters[:MAX_PARAMETERS]
    return f"{entry.name}({', '.join(shown)}{', ...' if len(entry.parameters) > len(shown) else ''})"


def prompt(entry: Entry) -> str:
    """Return the question about an entry."""
    if entry.kind in ("function", "method"):
        return f"What does {signature(entry)} do?"
    return f"What is the {entry.kind} {entry.name}?"


def _documents(entries: Iterable[Entry], held_out: CopyIndex) -> tuple[list[dict[str, Any]], int]:
    """Return one document an entry: its signature, then its paragraphs; and how many paragraphs were left out."""
    rows: list[dict[str, Any]] = []
    left_out = 0
    for entry in entries:
        blocks = paragraphs(entry.doc)
        kept = [block for block in blocks if words(block) and not held_out.has_near_copy(block)]
        left_out += len(blocks) - len(kept)
        if kept:
            title = entry.qualname if entry.kind == "topic" else signature(entry)
            rows.append({"id": entry.name, "text": "\n\n".join([title, *kept])})
    return rows, left_out


def _pairs(entries: Iterable[Entry], held_out: CopyIndex) -> tuple[list[_Pair], int]:
    """Return each distinct question with its answer, and how many were left out as copies."""
    pairs: dict[str, _Pair] = {}
    left_out = 0
    for entry in entries:
        answer = None if entry.kind == "topic" else summary(entry.doc)
        if answer is None:
            continue
        if held_out.has_near_copy(answer):
            left_out += 1
            continue
        question = prompt(entry)
        pairs.setdefault(question, _Pair(entry, question, answer))
    return list(pairs.values()), left_out


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _instruction(pair: _Pair) -> dict[str, Any]:
    return {"id": pair.entry.name, "messages": _user(pair.prompt) + _assistant(pair.answer)}


def _preferences(pairs: Sequence[_Pair], held_out: CopyIndex) -> tuple[list[dict[str, Any]], int]:
    """Return three comparisons a question, with a wrong answer, a spliced one, and a truncated or rambling one; and how
    many were left out, because what was cut or joined is a copy."""
    rows = []
    left_out = 0
    for pair in pairs:
        for flaw, rejected in _flawed(pair, pairs).items():
            if held_out.has_near_copy(rejected):
                left_out += 1
                continue
            rows.append(
                {
                    "id": f"{pair.entry.name}:{flaw}",
                    "prompt": _user(pair.prompt),
                    "chosen": _assistant(pair.answer),
                    "rejected": _assistant(rejected),
                }
            )
    return rows, left_out


def _flawed(pair: _Pair, pairs: Sequence[_Pair]) -> dict[str, str]:
    """Return one answer of each flaw, drawn by the question's hash."""
    others = [_other(pair, pairs, draw) for draw in range(3)]
    flawed = {"wrong": others[0], "spliced": _splice(pair.answer, others[1], pair.prompt)}
    if _draw("short or long", pair.prompt) % 2:
        flawed["truncated"] = _truncate(pair.answer, pair.prompt)
    else:
        flawed["rambling"] = _ramble(pair.answer, others[2], pair.prompt)
    return {flaw: text for flaw, text in flawed.items() if words(text) != words(pair.answer)}


def _other(pair: _Pair, pairs: Sequence[_Pair], draw: int) -> str:
    """Return the answer to another question, of the same kind of thing where a few tries find one."""
    chosen = pair
    for attempt in range(8):
        chosen = pairs[_draw("other", pair.prompt, draw, attempt) % len(pairs)]
        if chosen.answer != pair.answer and (chosen.entry.kind == pair.entry.kind or attempt >= 5):
            break
    return chosen.answer


def _splice(answer: str, other: str, key: str) -> str:
    """Join the head of one sentence to the tail of the other, in either order."""
    head, tail = (answer, other) if _draw("splice order", key) % 2 else (other, answer)
    head_words, tail_words = head.split(), tail.split()
    cut = 1 + _draw("splice head", key) % max(1, len(head_words) - 1)
    rest = 1 + _draw("splice tail", key) % max(1, len(tail_words) - 1)
    return " ".join(head_words[:cut] + tail_words[-rest:])


def _truncate(answer: str, key: str) -> str:
    """Break off in the middle of the sentence, without a period."""
    found = answer.split()
    return " ".join(found[: 2 + _draw("truncate", key) % max(1, len(found) - 2)]).rstrip(".,;:")


def _ramble(answer: str, other: str, key: str) -> str:
    """Repeat the answer or its last words, or go on about something else."""
    found = answer.split()
    match _draw("ramble", key) % 4:
        case 0:
            return f"{answer} {answer}"
        case 1:
            tail = " ".join(found[-min(4, len(found)) :])
            return f"{answer.rstrip('.')} {tail.rstrip('.')} {tail}"
        case _:
            return f"{answer} {other}"
