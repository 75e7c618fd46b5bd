"""The first rows of a source as a stage would put them to its model: one of them shown, and what would become of all.

Reads and encodes by the functions that build whole sets; no torch.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from recipes.data.text import PythonDocs, PythonSummaries, TextFiles
from trainers.data.columns import canonical
from trainers.data.dataset import BuildReport
from trainers.data.demo.python_docs import read_module
from trainers.data.demo.python_docs_sets import build_sets
from trainers.data.demo.python_docs_summaries import build_summaries
from trainers.data.encoding import conversation_of, mark_row
from trainers.data.files import find_files, read_text_head
from trainers.data.layouts import Count
from trainers.data.materialise import DataRequest, build_parts, build_report
from trainers.data.sources import Row, of_documentation, unselected_rows

SHOWN_MODULES = ("textwrap", "heapq")
"""Modules that stand for the whole documentation, which takes seconds to read."""

PieceKind = Literal["prompt", "target"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a row's text."""

    kind: PieceKind
    """prompt: the model reads it; target: it learns to write it, or to tell it from others."""
    text: str


def first_rows(request: DataRequest, count: int) -> list[Row]:
    """Return the first rows before any selection; of the documentation those of a few modules.

    Raises RequestError for a row that does not fit.
    """
    match request.source:
        case PythonDocs() | PythonSummaries():
            rows: Iterator[Row] = _documented(request)
        case TextFiles() as source:
            path = find_files(source.files, request.base_dir)[0]
            rows = (Row(name, columns) for name, columns in read_text_head(path, source.documents))
        case _:
            rows = unselected_rows(request.source, request.base_dir, request.role)
    return list(islice(rows, count))


def show_row(row: Row, request: DataRequest) -> list[Piece]:
    """Return a row's text as the model gets it, end token included, cut where targets start and end."""
    if request.template == "chat":
        row = conversation_of(row)
    text, spans = mark_row(row, request.role, request.tokenization)
    if request.role == "instructions" and request.loss_on == "all":
        spans = [(0, len(text))]
    if request.role == "labels":
        label = row.columns["label"]
        return [Piece("prompt", text), *([] if label is None else [Piece("target", label)])]
    pieces: list[Piece] = []
    place = 0
    for start, end in spans:
        pieces += [Piece("prompt", text[place:start]), Piece("target", text[start:end])]
        place = end
    return [piece for piece in [*pieces, Piece("prompt", text[place:])] if piece.text]


def judge_rows(rows: Iterable[Row], request: DataRequest) -> BuildReport:
    """Say what would become of these rows."""
    counted = Count()
    parts, _ = build_parts(request, rows, counted)
    return build_report(parts, counted)


def _documented(request: DataRequest) -> Iterator[Row]:
    name = "summaries" if isinstance(request.source, PythonSummaries) else request.role
    name = "instructions" if name in ("labels", "seq2seq") else name
    for line in _documents()[name]:
        row: dict[str, Any] = json.loads(line)
        row_id = row.pop("id")
        if name == "summaries":
            yield Row(row_id, canonical(row, request.role, {}))
        else:
            yield Row(row_id, of_documentation(row, request.role))


@lru_cache(maxsize=1)
def _documents() -> dict[str, list[bytes]]:
    entries = [entry for module in SHOWN_MODULES for entry in read_module(module)]
    files = build_sets(entries).files() | build_summaries(entries)
    found: dict[str, list[bytes]] = {}
    for name, content in files.items():
        found.setdefault(name.split(".")[0], []).extend(content.splitlines())
    return found
