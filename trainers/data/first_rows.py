"""The first rows of a source as a stage would put them to its model: one of them shown, and what would become of all.

Reads and encodes by the functions that build whole sets; no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trainers.data.dataset import BuildReport
from trainers.data.encoding import conversation_of, mark_row
from trainers.data.layouts import Count
from trainers.data.materialise import DataRequest, build_parts, build_report
from trainers.data.rows import Row, column_names, to_row
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import read_all

PieceKind = Literal["prompt", "target"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a row's text."""

    kind: PieceKind
    """prompt: the model reads it; target: it learns to write it, or to tell it from others."""
    text: str


def first_rows(request: DataRequest, count: int) -> list[Row]:
    """Return the first rows before any selection; none of a data set that would have to be fetched.

    Raises SourceError for a row that does not fit.
    """
    reader = open_source(request.source, request.base_dir, request.role)
    if reader.is_remote:
        return []
    columns = column_names(request.source)
    return [to_row(raw, request.role, columns) for raw in read_all(reader, count)]


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
