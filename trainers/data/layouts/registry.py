"""Which layouts there are, and which one rows of text take."""

from typing import Protocol

from trainers.data.columns import RowRole
from trainers.data.dataset import DataLayout
from trainers.data.encoding import Marked, TextSettings
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.images import Images
from trainers.data.layouts.labelled import Labelled
from trainers.data.layouts.packed import Packed
from trainers.data.layouts.pairs import Pairs
from trainers.data.layouts.prompts import Prompts
from trainers.data.layouts.seq2seq import Seq2Seq
from trainers.data.layouts.stream import Stream
from trainers.data.rows import Row

LAYOUTS: dict[str, type[DataLayout]] = {
    layout.name: layout for layout in (Packed, Stream, Labelled, Seq2Seq, Pairs, Prompts, ImageText, Images)
}
"""By the names under which sets know them."""


class TextLayout(DataLayout, Protocol):
    """A layout of rows of text alone."""

    @property
    def text(self) -> TextSettings:
        """How texts become tokens."""

    def mark(self, row: Row) -> Marked:
        """Return a row's text as a model reads it, with its targets; of a pair the chosen answer."""


def text_layout(role: RowRole, text: TextSettings) -> TextLayout:
    """Return the layout of rows that are read for a role; streams and rows with images are asked for by their class."""
    match role:
        case "text" | "instructions":
            return Packed(text, role)
        case "labels":
            return Labelled(text)
        case "seq2seq":
            return Seq2Seq(text)
        case "preferences":
            return Pairs(text)
        case "prompts":
            return Prompts(text)
        case "image_text":
            raise ValueError("rows with images need the processor of a model")
