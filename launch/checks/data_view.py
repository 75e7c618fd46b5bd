"""Rows of a recipe's text as they will be trained on, targets marked; and which rows are dropped and why."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launch.checks.stage_sources import StageSource, stage_sources
from launch.inputs.data_check import load_checked
from recipes.errors import RequestError
from recipes.stages.answers import ROLES
from trainers.data.encoding import Encoded
from trainers.data.first_rows import filtered, first_rows
from trainers.data.layouts.registry import TextLayout
from trainers.data.materialise import lay_out
from trainers.data.rows import Row
from trainers.data.selection import select
from trainers.store.store import Store

LOOKED_AT = 1000
"""Rows that are read of each source."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a row."""

    id: int
    text: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class Side:
    """A sequence of tokens: a whole row, an answer of a pair after its prompt, a source or a target."""

    name: str
    tokens: tuple[Token, ...]

    @property
    def targets(self) -> int:
        """How many tokens are learnt."""
        return sum(token.is_target for token in self.tokens)


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as the model gets it."""

    row: str
    """File and row."""
    sides: tuple[Side, ...]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class SourceView:
    """A source's first rows, and what becomes of them."""

    stage: str
    field: str
    role: str
    template: str
    tokenizer: str
    rows_in: int
    """Rows that were read, after hold_out and part."""
    report: dict[str, Any]
    """The build report of these rows; see docs/data.md."""
    rows: tuple[ShownRow, ...]
    lost: dict[str, dict[str, str]]
    """Why rows were left out -> their names -> what they hold."""

    def to_json(self) -> dict[str, Any]:
        """The stable `--json` form."""
        return asdict(self)


def view_data(
    recipe: str | Path,
    stage: str | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    store: str | None = None,
    count: int = 3,
) -> list[SourceView]:
    """Read the first rows of a recipe's text, or of one stage's; raises RecipeError, RequestError.

    Sources of the hub, images and rows with images are left out, as are models of a store that is not given.
    """
    loaded = load_checked(Path(recipe), overrides, smoke)
    stages = list(loaded.recipe.stages)
    if stage is not None and stage not in stages:
        raise RequestError(f"there is no stage {stage}; there are: {', '.join(stages)}")
    sources = stage_sources(loaded, None if store is None else Store.open(store))
    wanted = [source for source in sources if stage in (None, source.stage)]
    views = (_view(source, loaded.base_dir, loaded.recipe.seed, count) for source in wanted)
    return [view for view in views if view is not None]


def _view(source: StageSource, base_dir: Path, seed: int, count: int) -> SourceView | None:
    use, layout = source.use, source.layout
    read = first_rows(use.plain, base_dir, source.role, LOOKED_AT)
    read, left_out = filtered(read, use.plain, base_dir, source.known_tokenization)
    everything = use.plain.changed(limit=None)
    rows = list(select(lambda: iter(read), everything, seed, held_out=use.held_out))
    if not rows and not left_out.counts:
        return None
    _, report = lay_out(layout, rows)
    report = replace(report, filtered=dict(left_out.counts))
    by_id = {row.id: row for row in rows}
    dropped = {} if report.fate is None else report.fate.dropped
    examples = {} if report.fate is None else report.fate.examples
    lost = {reason: {name: _held(by_id[name]) for name in examples.get(reason, ())} for reason in dropped}
    lost |= {reason: {row["row"]: _written(row) for row in shown} for reason, shown in left_out.examples.items()}
    gone = {name for names in lost.values() for name in names}
    kept = (row for row in rows if not row.reading.drop and row.id not in gone)
    return SourceView(
        stage=source.stage,
        field=use.field_path,
        role=source.role,
        template=layout.text.template,
        tokenizer="the model's" if source.is_trained else "not trained yet: bytes",
        rows_in=len(rows),
        report=report.to_json(),
        rows=tuple(_shown(row, layout) for row in islice(kept, count)),
        lost=lost,
    )


def _shown(row: Row, layout: TextLayout) -> ShownRow:
    """Encode a row as its layout does, before it is cut at the sequence length."""
    _, *found = next(iter(layout.encode([row])))
    encoded = [item for item in found if isinstance(item, Encoded | np.ndarray)]
    names = ROLES[layout.role].sides
    sides = (_side(name, item, layout) for name, item in zip(names, encoded, strict=True))
    return ShownRow(row.id, tuple(sides), row.columns.get("label"))


def _side(name: str, encoded: Encoded | np.ndarray, layout: TextLayout) -> Side:
    if isinstance(encoded, np.ndarray):
        encoded = Encoded(encoded, np.full(len(encoded), name == "target"))
    facts = ROLES[layout.role]
    is_all = facts.is_tuning and layout.text.loss_on == "all"
    decode = layout.text.tokenization.decode
    tokens = (
        Token(int(number), decode([number], skip_special=False), not facts.is_only_read and bool(is_all or is_target))
        for number, is_target in zip(encoded.ids, encoded.response, strict=True)
    )
    return Side(name, tuple(tokens))


def _held(row: Row) -> str:
    return _written(row.columns)


def _written(columns: Mapping[str, Any]) -> str:
    return json.dumps(columns, ensure_ascii=False, default=str)
