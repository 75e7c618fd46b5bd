"""Which layouts there are, and which one rows of text take."""

from collections.abc import Callable
from functools import partial
from typing import Protocol, get_args

from recipes.stages.answers import CaseForm
from trainers.data.dataset import DataLayout
from trainers.data.encoding import Marked, TextSettings
from trainers.data.layouts.cases import Cases
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.images import Images
from trainers.data.layouts.judged import Judged
from trainers.data.layouts.labelled import Labelled
from trainers.data.layouts.packed import Packed, PackedRole
from trainers.data.layouts.pairs import Pairs
from trainers.data.layouts.prompts import Prompts
from trainers.data.layouts.seq2seq import Seq2Seq
from trainers.data.layouts.stream import Stream
from trainers.data.row_forms import RowRole
from trainers.data.rows import Row


class TextLayout(DataLayout, Protocol):
    """A layout of rows of text alone."""

    @property
    def text(self) -> TextSettings:
        """How texts become tokens."""

    def mark(self, row: Row) -> Marked:
        """Return a row's text as a model reads it, with its targets; of a pair the chosen answer."""


TEXT_LAYOUTS = (Labelled, Seq2Seq, Pairs, Judged)
"""Each takes the rows of its role, and has no settings of its own."""
LAYOUTS: dict[str, type[DataLayout]] = {
    layout.name: layout for layout in (Packed, Stream, ImageText, Images, Prompts, Cases, *TEXT_LAYOUTS)
}
"""By the names under which sets know them."""


def text_layout(
    role: RowRole, text: TextSettings, carried: tuple[str, ...] = (), form: CaseForm | None = None
) -> TextLayout:
    """Return the layout of rows of text alone that are read for a role; a stream is asked for by its class.

    Columns are carried along with prompts and cases alone; `form` makes cases of rows.
    """
    by_role: dict[RowRole, Callable[[TextSettings], TextLayout]] = {
        **{packed: partial(Packed, role=packed) for packed in get_args(PackedRole)},
        **{layout.role: layout for layout in TEXT_LAYOUTS},
        Prompts.role: partial(Prompts, carried=carried),
        Cases.role: lambda text: Cases.of(text, form, carried),
    }
    return by_role[role](text)
