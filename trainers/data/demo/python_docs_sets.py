"""The four sets made from the documentation: text, instructions, preferences and prompts, split by module."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, get_args

from recipes.data.text import Split
from trainers.data.demo.prose import CopyIndex, paragraphs, summary, words
from trainers.data.demo.python_docs import Entry

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

WRONG_DRAWS = 36
WRONG_CANDIDATES = 6
"""A wrong answer is the most commonplace of the first few drawn ones of like length."""

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
    """Return three or four comparisons a question: a wrong, a garbled, a truncated and maybe a rambling answer; and how
    many were left out, because what was cut or joined is a copy."""
    rows = []
    left_out = 0
    answers = Answers.of([pair.answer for pair in pairs])
    for pair in pairs:
        for flaw, rejected in _flawed(pair, answers).items():
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


@dataclass(frozen=True)
class Answers:
    """All answers of a split, their words, and how commonplace each answer is."""

    texts: list[str]
    words: list[str]
    lengths: list[int]
    """Words of an answer."""
    commonness: list[float]
    """Mean log-frequency of an answer's words."""

    @staticmethod
    def of(texts: list[str]) -> "Answers":
        """Count the words of all answers."""
        frequency = Counter(word for text in texts for word in words(text))
        commonness = [fmean(math.log(frequency[word]) for word in words(text)) for text in texts]
        parts = [text.split() for text in texts]
        return Answers(texts, [word for part in parts for word in part], [len(part) for part in parts], commonness)

    def commonplace(self, answer: str, key: str) -> str:
        """Return another answer of like length: of a few drawn ones the most commonplace, which says the least."""
        length = len(answer.split())
        drawn = (_draw("wrong", key, attempt) % len(self.texts) for attempt in range(WRONG_DRAWS))
        like = (index for index in drawn if abs(self.lengths[index] - length) <= max(2, length // 4))
        candidates = list(islice(like, WRONG_CANDIDATES)) or [_draw("wrong", key, 0) % len(self.texts)]
        return self.texts[max(candidates, key=lambda index: self.commonness[index])]

    def garble(self, answer: str, key: str) -> str:
        """Put words of other answers in the place of some of the answer's; the closing period stays."""
        found = answer.rstrip(".").split()
        share = 0.15 + 0.45 * _uniform("garbled share", key)
        fixed = _draw("garbled word", key) % len(found)
        for index in range(len(found)):
            if index == fixed or _uniform("garbled", key, index) < share:
                found[index] = self.words[_draw("garbled by", key, index) % len(self.words)].rstrip(".")
        return " ".join(found) + ("." if answer.endswith(".") else "")


def _flawed(pair: _Pair, answers: Answers) -> dict[str, str]:
    """Return one answer of each flaw, drawn by the question's hash."""
    flawed = {
        "wrong": answers.commonplace(pair.answer, pair.prompt),
        "garbled": answers.garble(pair.answer, pair.prompt),
    }
    flawed["truncated"] = _truncate(pair.answer, pair.prompt)
    if _draw("rambling too", pair.prompt) % 2:
        other = answers.texts[_draw("other", pair.prompt) % len(answers.texts)]
        flawed["rambling"] = _ramble(pair.answer, other, pair.prompt)
    return {flaw: text for flaw, text in flawed.items() if words(text) != words(pair.answer)}


def _truncate(answer: str, key: str) -> str:
    """Break off in the middle of the sentence; every other time a period pretends that this is all."""
    found = answer.split()
    most = max(2, math.ceil(0.7 * len(found)))
    cut = " ".join(found[: 1 + _draw("truncate", key) % (most - 1)]).rstrip(".,;:(")
    return f"{cut}." if _draw("truncated with a period", key) % 2 else cut


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
