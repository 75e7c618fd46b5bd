"""A source read as training reads it, stopped after the first rows of each file: what is wrong with it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.data.filters import ByContamination, Filter
from recipes.data.images import ImageSource
from recipes.data.text import Mix, Source
from recipes.problem_codes import Code
from trainers.data.bad_row import BadRow
from trainers.data.carried import carried
from trainers.data.filters.contamination import evaluation_sources
from trainers.data.filters.judge import open_filter
from trainers.data.images import OneShape, open_image, to_image
from trainers.data.row_forms import RowRole, opens_images
from trainers.data.row_images import find_images
from trainers.data.rows import Row, column_names, to_row
from trainers.data.selection import select
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import RawRow, Reader, SourceError

CHECKED_ROWS = 20
"""Of each file."""
CHECKED_FILES = 32
"""Of each pattern."""


def check_text(
    source: Source, base_dir: Path, roles: Sequence[RowRole], columns_read: Sequence[str] = ()
) -> list[SourceError]:
    """Read the first rows of each source's files in the role, or in any of several where it is not known which it is.

    `columns_read` are those that a reward reads besides. What the hub holds is not fetched. An error's `field` is the
    source's key.
    """
    seen, errors = _Seen(), _filter_errors(source.filter, base_dir) if isinstance(source, Mix) else []
    for member in source.members():
        read = partial(_check_row, roles=roles, columns=column_names(member.source), read=columns_read, seen=seen)
        found = _errors(open_source(member.source, base_dir, roles[0]), read, seen)
        filters = _filter_errors(member.source.filter, base_dir)
        errors += [error.within(member) for error in (*filters, *found)]
    if not errors and seen.is_whole and opens_images(roles) and not seen.images:
        message = "no row has an image, and the model is a vision-language model"
        return [SourceError(Code.MISSING_IMAGES, message, "fine-tune a language model on text alone", "source")]
    return errors


def _filter_errors(filters: Sequence[Filter] | None, base_dir: Path) -> list[SourceError]:
    """Make filters ready, and read the first rows of the evaluation sets; of each filter the first error."""
    errors: list[SourceError] = []
    for number, settings in enumerate(filters or ()):
        place, found = f"filter.{number}", []
        if isinstance(settings, ByContamination):
            place += ".against"
            for known in evaluation_sources(settings.against):
                found += _errors(open_source(known, base_dir), lambda raw: True, _Seen())
        else:
            try:
                open_filter(settings, base_dir, None)
            except SourceError as error:
                found = [error]
        errors += [SourceError(error.code, error.message, error.suggestion, place) for error in found[:1]]
    return errors


def _check_row(
    raw: RawRow, *, roles: Sequence[RowRole], columns: Mapping[str, str], read: Sequence[str], seen: "_Seen"
) -> bool:
    """Read a row with its images, and the columns that a reward reads; returns whether it holds anything."""
    row = _fitting(raw, roles, columns)
    try:
        carried(raw.columns, read)
    except BadRow as error:
        raise SourceError(error.code, f"{raw.place}: {error}", error.suggestion) from None
    images = row.columns.get("images", ())
    for image in images:
        open_image(image.read(), image.name)
    seen.images += len(images)
    return any(not isinstance(value, str) or value.strip() for value in row.columns.values())


def check_images(source: ImageSource, base_dir: Path) -> list[SourceError]:
    """Read and decode the first images of each file; all must be of one shape."""
    one_shape = OneShape()

    def read(raw: RawRow) -> bool:
        return bool(one_shape.require(to_image(raw, source)).pixels_HWC.size)

    return _errors(open_source(source, base_dir), read, _Seen())


@dataclass(frozen=True)
class FirstImages:
    """What the first images of a source tell."""

    classes: tuple[str, ...] = ()
    """Their labels."""
    counts: tuple[int, int] | None = None
    """Held-out images and others, as the source selects them; None: there are more than were read."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Columns that nothing reads, and how many of the images' rows have them."""


def first_images(source: ImageSource, base_dir: Path) -> FirstImages:
    """Read the first images of each file; tells nothing where one cannot be read, which `check_images` reports."""
    reader = open_source(source, base_dir)
    if reader.is_remote:
        return FirstImages()
    try:
        parts = [*islice(reader.parts(), CHECKED_FILES + 1)]
        read = [[to_image(raw, source) for raw in part.rows(CHECKED_ROWS)] for part in parts]
    except SourceError:
        return FirstImages()
    images = [image for of_part in read for image in of_part]
    is_whole = len(parts) <= CHECKED_FILES and all(len(of_part) < CHECKED_ROWS for of_part in read)
    classes = tuple(sorted({str(image.label) for image in images if image.label is not None}))
    held_out, others = (
        sum(1 for _ in select(lambda: iter(images), source, 0, held_out=held_out)) for held_out in (True, False)
    )
    unread = Counter(name for image in images for name in image.unread)
    return FirstImages(classes, (held_out, others) if is_whole else None, dict(unread))


class _Seen:
    """What was met in the rows."""

    def __init__(self) -> None:
        self.images = 0
        self.is_whole = True
        """Whether the source has no rows but those that were read."""


def _errors(reader: Reader, read: Callable[[RawRow], bool], seen: _Seen) -> list[SourceError]:
    """Read the first rows of each part; `read` says whether a row holds anything. Of each part the first error."""
    errors: list[SourceError] = []
    if reader.is_remote:
        seen.is_whole = False
        try:
            reader.files()
        except SourceError as error:
            return [error]
        return []
    parts: Counter[str] = Counter()
    found, first = 0, None
    for part in reader.parts():
        first = first or part
        parts[part.field] += 1
        if parts[part.field] > CHECKED_FILES:
            seen.is_whole = False
            continue
        rows = 0
        try:
            for raw in part.rows(CHECKED_ROWS):
                rows += 1
                found += read(raw)
        except SourceError as error:
            errors.append(error.at(part.field))
        seen.is_whole = seen.is_whole and rows < CHECKED_ROWS
    if not errors and not found and first is not None:
        what = f"{first.path} holds" if first.path.name else "the source has"
        errors.append(SourceError(Code.EMPTY_FILE, f"{what} no rows", field=first.field))
    return errors


def _fitting(raw: RawRow, roles: Sequence[RowRole], columns: Any) -> Row:
    """Bring a row into the first of the roles that it fits; raises the first one's SourceError."""
    if len(roles) > 1 and find_images(raw.columns, columns):
        return to_row(raw, "image_text", columns)
    refused: SourceError | None = None
    for role in roles:
        try:
            return to_row(raw, role, columns)
        except SourceError as error:
            refused = refused or error
    assert refused is not None
    raise refused
