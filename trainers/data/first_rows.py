"""The first rows of a source, and one of them as a stage would put it to its model; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.data.text import PlainSource
from trainers.data.encoding import naming
from trainers.data.filters.judge import Filtering, LeftOut, open_filters
from trainers.data.layouts.registry import TextLayout
from trainers.data.row_forms import RowRole
from trainers.data.rows import Row, column_names, to_row
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import read_all
from trainers.data.tokenizer import Tokenization

PieceKind = Literal["prompt", "target"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a row's text."""

    kind: PieceKind
    """prompt: the model reads it; target: it learns to write it, or to tell it from others."""
    text: str


def first_rows(source: PlainSource, base_dir: Path, role: RowRole, count: int) -> list[Row]:
    """Return the first rows before any selection; none of a data set that would have to be fetched.

    Raises SourceError for a row that does not fit.
    """
    reader = open_source(source, base_dir, role)
    if reader.is_remote:
        return []
    columns = column_names(source)
    return [to_row(raw, role, columns) for raw in read_all(reader, count)]


def filtered(
    rows: list[Row], source: PlainSource, base_dir: Path, tokenization: Tokenization | None
) -> tuple[list[Row], LeftOut]:
    """Return the rows that a source's filters leave, and what they leave out; raises SourceError."""
    count = None if tokenization is None else lambda text: len(tokenization.encode(text))
    filtering = Filtering(count)
    filters = open_filters(source.filter or (), base_dir, count)
    return list(filtering.kept(lambda: iter(rows), filters)()), filtering.left_out


def show_row(row: Row, layout: TextLayout) -> list[Piece]:
    """Return a row's text as the model gets it, end token included, cut where targets start and end."""
    row = layout.text.ask(row)
    with naming(row):
        marked = layout.mark(row).with_end(layout.text.tokenization.eos_token)
    pieces: list[Piece] = []
    place = 0
    for start, end in marked.spans:
        pieces += [Piece("prompt", marked.text[place:start]), Piece("target", marked.text[start:end])]
        place = end
    pieces += [Piece("prompt", marked.text[place:]), Piece("target", marked.label or "")]
    return [piece for piece in pieces if piece.text]
