"""Rows of text: read from any source, brought into their role's form, with part, limit and hold_out applied."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes.data.selection import Member
from recipes.data.text import Mix, PlainSource, Source
from recipes.tokenizers.chat_template import template_names
from trainers.data.bad_row import BadRow
from trainers.data.columns import STANDARD_READING, Reading, convert
from trainers.data.filters.judge import Filtering, open_filters
from trainers.data.messages import ROLES, other_keys
from trainers.data.row_forms import ROW_FORMS, Role, RowRole
from trainers.data.row_images import open_row_images
from trainers.data.selection import select
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import RawRow, SourceError, naming_member, read_all
from trainers.store.store import Store


@dataclass(frozen=True, slots=True)
class Row:
    """One row in its role's form (`columns.convert`), and where it came from."""

    id: str
    """File and row, for example `train.jsonl:17`; for python-docs the dotted name. In a mixture after its source's name
    and a slash.
    """
    columns: dict[str, Any]
    reading: Reading = STANDARD_READING
    own: Mapping[str, Any] = field(default_factory=dict)
    """Of a prompt: the row's own columns, some of which a layout may carry along."""
    source: str = ""
    """Its source's name in a mixture."""

    def key(self) -> bytes:
        """Return what part and hold_out go by: the prompt where there is one, else the row without its label.

        So stages that read the same rows in different roles keep the same ones away from training.
        """
        columns = self.columns
        if "messages" in columns:
            messages = columns["messages"]
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            shared: Any = messages[: turns[0]] if turns and turns[0] else messages
        else:
            shared = columns.get("prompt") or {name: value for name, value in columns.items() if name != "label"}
        if "images" in columns:
            shared = [shared, columns["images"]]
        return hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode()).digest()


def read_rows(
    source: Source,
    base_dir: Path,
    role: RowRole,
    seed: int,
    *,
    held_out: bool = False,
    store: Store | None = None,
    filtering: Filtering | None = None,
) -> Iterator[Row]:
    """Yield the selected rows in source order; raises SourceError naming file and row of anything unreadable.

    First hold_out (or, with `held_out`, only what it keeps away: in a mixture all of a source that has none), then
    part, then limit. Filters come before all of these: what they leave out is neither trained on nor held out, and
    counted in `filtering`. `store` keeps what was extracted from python-docs, so that its sources are read once.
    """
    filtering = filtering or Filtering()
    shared = open_filters(source.filter or (), base_dir, filtering.count_tokens) if isinstance(source, Mix) else ()
    read: list[Callable[[], Iterator[Row]]] = []
    members: Sequence[Member[PlainSource]] = source.members()
    for member in members:
        with naming_member(member):
            own = open_filters(member.source.filter or (), base_dir, filtering.count_tokens)
            rows = filtering.kept(partial(_all_rows, member.source, base_dir, role, store), own, member.name)
            read.append(filtering.kept(rows, shared, member.name))
    for member, rows in zip(members, read, strict=True):
        name, own_source = member.name, member.source
        is_held_out = held_out and (own_source.hold_out > 0 or not name)
        with naming_member(member):
            for row in select(rows, own_source, seed, held_out=is_held_out):
                yield replace(row, id=f"{name}/{row.id}", source=name) if name else row


def _all_rows(source: PlainSource, base_dir: Path, role: RowRole, store: Store | None) -> Iterator[Row]:
    columns = column_names(source)
    return (to_row(raw, role, columns) for raw in read_all(open_source(source, base_dir, role, store)))


def unread_parts(row: Row, role: Role, template: str | None) -> list[str]:
    """Name the columns of a row that nothing reads, and the keys of its messages that the chat template does not."""
    found = list(row.reading.unread)
    if not {"messages", "prompt", "tools"} & row.columns.keys():
        return found
    names = template_names(template) if template is not None else frozenset()
    has_weights = role in ROW_FORMS and ROW_FORMS[role].has_weights
    weighs = {"weight"} if has_weights else set()
    for column, value in row.columns.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
            found += [f"{column}.{key}" for key in sorted(other_keys(value) - names - weighs)]
    if "tools" in row.columns and "tools" not in names:
        found.append("tools")
    return found


def unknown_roles(rows: Iterable[Row], template: str | None) -> dict[str, int]:
    """Count rows by the roles of their turns that are no usual ones and that the chat template does not mention."""
    names = ROLES if template is None else ROLES | template_names(template)
    found: Counter[str] = Counter()
    for row in rows:
        turns = (turn for value in row.columns.values() if isinstance(value, list) for turn in value)
        roles = {turn.get("role") for turn in turns if isinstance(turn, dict)}
        found.update(role for role in roles if isinstance(role, str) and role not in names)
    return dict(found)


def column_names(source: PlainSource) -> Mapping[str, str]:
    """Return the source's own names of standard columns."""
    return getattr(source, "columns", {})


def to_row(raw: RawRow, role: RowRole, columns: Mapping[str, str]) -> Row:
    """Bring a row into its form; the images that it names are opened, relative paths from its file's folder."""
    form = ROW_FORMS[role]
    if not form.columns:
        return Row(raw.id, {"case": raw.columns})
    own = raw.columns if form.keeps_columns else {}
    if raw.is_canonical:
        return Row(raw.id, raw.columns, own=own)
    try:
        converted = convert(raw.columns, role, columns)
    except BadRow as error:
        raise SourceError(error.code, f"{raw.place}: {error}", error.suggestion) from None
    found, reading = converted.columns, converted.reading
    if raw.form:
        reading = replace(reading, form=", ".join(filter(None, (raw.form, reading.form))))
    if form.opens_images:
        found["images"] = open_row_images(found["images"], raw.folder, raw.place)
    return Row(raw.id, found, reading, own)
