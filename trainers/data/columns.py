"""TRL's standard columns, plain or conversational, and published forms, checked and brought into one form per role."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.problem_codes import Code
from recipes.stages.answers import ROLES
from trainers.data.bad_row import BadRow, columns_of
from trainers.data.column_paths import find_value
from trainers.data.messages import (
    EMPTY_TURN,
    has_empty_turn,
    read_tools,
    with_system,
)
from trainers.data.published import ASKED_PAIR, Published, Standard, is_transcript, recognise
from trainers.data.row_forms import ROW_FORMS, RowRole, plain
from trainers.data.row_images import find_images

STANDARD = ("text", "label", "messages", "prompt", "completion", "chosen", "rejected", "system", "tools", "reference")
SHAREGPT = "conversations"
"""ShareGPT's column of messages."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a row was read, for `check` and the build report."""

    form: str = ""
    """The published form that was recognised; empty: the standard columns."""
    unread: tuple[str, ...] = ()
    """Columns that hold something and are not read."""
    drop: str = ""
    """Why the row is to be left out; empty: it is not."""


STANDARD_READING = Reading()
"""Standard columns, all of them read."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A row in its role's form."""

    columns: dict[str, Any]
    reading: Reading


class _Found(Mapping[str, Any]):
    """Standard columns of a row, which note that they are read."""

    def __init__(self, values: Standard, origins: Mapping[str, Sequence[str]], form: str = "") -> None:
        self._values = values
        self._origins = origins
        self.form = form
        self.read: set[str] = set()
        """The row's own columns."""

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self.read.update(self._origins[name])
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def convert(row: Mapping[str, Any], role: RowRole, columns: Mapping[str, str]) -> Converted:
    """Bring a row into its role's form, from TRL's columns, those that `columns` names, or a published form.

    text: {text}; of a plain prompt and completion {text, prompt}, one below the other. labels: {text, label}; a label
    that is missing or None is unknown. instructions: {messages}, {prompt, completion} or {text}. image-text: {messages,
    images} with every content a list of parts {type: text, text} and {type: image}, or {prompt, completion, images};
    images are as the row names them. seq2seq: {prompt, completion}, the completion plain text; of messages the last
    turn, which is the assistant's. preferences: {prompt, chosen, rejected}; without a prompt it is the common beginning
    of both, and `split` is True where they are plain text. judged: {prompt, completion, label}, the label True where
    the completion is desirable; of messages that is the last turn. prompts: {prompt, reference}. Conversations start
    with the row's `system` prompt; beside a plain prompt it is a column of its own, as the descriptions of `tools`
    always are. Raises BadRow.
    """
    found, form = _find(row, role, columns), ROW_FORMS[role]
    try:
        converted = form.read(found, find_images(row, columns) if form.names_images else None)
    except BadRow:
        if any(found.keys() >= set(alternative) for alternative in form.columns):
            raise
        needed = " or ".join(" and ".join(alternative) for alternative in form.columns)
        suggestion = f"{columns_of(row)}; map them with `columns`"
        raise BadRow(f"needs {needed}", suggestion, Code.MISSING_COLUMN) from None
    if form.has_asides:
        converted |= _asides(found, converted)
    images = {columns.get(name, name) for name in ("images", "image")} if form.names_images else set()
    unread = [name for name, value in row.items() if not _is_blank(value) and name not in {*found.read, *images}]
    is_empty = any(has_empty_turn(value) for value in converted.values())
    return Converted(converted, Reading(found.form, tuple(unread), EMPTY_TURN if is_empty else ""))


def _find(row: Mapping[str, Any], role: RowRole, columns: Mapping[str, str]) -> _Found:
    """Find the standard columns of a row: its own, those that `columns` names, those of a published form."""
    values = {name: row[name] for name in STANDARD if row.get(name) is not None}
    origins: dict[str, Sequence[str]] = {name: [name] for name in values}
    named = ""
    if SHAREGPT in row and "messages" not in values:
        values["messages"], origins["messages"], named = row[SHAREGPT], [SHAREGPT], "sharegpt"
    if is_transcript(values.get("chosen", values.get("prompt"))):
        named = "hh-rlhf"
    for name, written in columns.items():
        values[name], origins[name] = find_value(row, name, written)
    form = None if columns else _published(row, values, role)
    if form is None:
        return _Found(values, origins, named)
    given = form.convert(row)
    own = [name for name in (*form.needs, *form.reads) if name in row]
    return _Found({**values, **given}, {**origins, **dict.fromkeys(given, own)}, form.name)


def _published(row: Mapping[str, Any], values: Standard, role: RowRole) -> Published | None:
    wanted = ROW_FORMS[role]
    if not wanted.published:
        return None
    if not any(values.keys() >= set(alternative) for alternative in wanted.columns):
        return recognise(row, wanted.published)
    is_pair = ROLES[role].has_pairs and "prompt" not in values and ASKED_PAIR.fits(row)
    return ASKED_PAIR if is_pair and not is_transcript(row["chosen"]) else None


def _asides(found: _Found, converted: dict[str, Any]) -> dict[str, Any]:
    """Read a row's system prompt and tools; returns the columns that they change or add."""
    changed: dict[str, Any] = {}
    if "text" in converted:
        return changed
    if "tools" in found and (tools := read_tools(found["tools"])):
        changed["tools"] = tools
    if "system" in found and (system := plain(found, "system")):
        name = "messages" if "messages" in converted else "prompt"
        asked = converted[name]
        changed |= {"system": system} if isinstance(asked, str) else {name: with_system(asked, system)}
    return changed


def _is_blank(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}
