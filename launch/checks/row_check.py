"""What `check` reports about the first rows of each source: one row as the model gets it, and how many are usable."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from launch.inputs.data_check import row_roles
from recipes.data.text import ExistingTokenizer, TrainTokenizer
from recipes.errors import Problem, RequestError, StoreDamaged
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.architecture import MODEL_TYPES
from recipes.models.base import TextFamily
from recipes.problem_codes import Code
from recipes.references import FolderRef, Reference, StoreRef, parse_reference
from recipes.rules.chain import origin
from recipes.rules.models import model_facts
from recipes.stages.answers import Role, SourceUse, default_template
from recipes.stages.base import TextStage
from recipes.stages.pretrain import Pretrain
from trainers.data.dataset import WARN_LOST, BuildReport
from trainers.data.encoding import TextSettings
from trainers.data.first_rows import Piece, first_rows, show_row
from trainers.data.layouts.registry import TextLayout, text_layout
from trainers.data.materialise import lay_out
from trainers.data.row_forms import RowRole
from trainers.data.rows import unknown_roles
from trainers.data.tokenizer import (
    TOKENIZER_FILES,
    Tokenization,
    load_tokenization,
    tokenization_from_files,
    train_tokenizer,
)
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

NUM_ROWS = 100
TOLD_TO_MODEL = ("tools", "system", "input", "history", "context", "weight")
"""Columns that published sets have for the model's eyes."""
SHOWN_PIECES = 6
SHOWN_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class StageRow:
    """A row of a stage's source as its model gets it."""

    stage: str
    field: str
    row: str
    """File and row."""
    template: str | None
    """None where no prompt is put to the model."""
    pieces: tuple[Piece, ...]
    forms: dict[str, int]
    """Published forms that the first rows were recognised as, and how many of them."""
    unread: dict[str, int]
    """Columns and keys of messages that nothing reads, and how many of the first rows have them."""

    def to_json(self) -> dict[str, Any]:
        """The stable `--json` form."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The row as people read it: line breaks as \\n, long texts without their middle."""
        yield f"{self.stage}.{self.field}, {self.row}" + (f", template: {self.template}" if self.template else "")
        if self.forms:
            yield f"  recognised as {', '.join(self.forms)}"
        if self.unread:
            yield f"  not read: {', '.join(self.unread)}"
        for piece in self.pieces[:SHOWN_PIECES]:
            yield f"  {piece.kind}  {_shortened(piece.text)}"
        if len(self.pieces) > SHOWN_PIECES:
            yield f"  and {len(self.pieces) - SHOWN_PIECES} more"


@dataclass(slots=True)
class RowFindings:
    """What was found in the first rows of every source."""

    rows: list[StageRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Reader:
    """The tokenizer of a stage's model; one that is yet to be trained has no merges, so that it counts bytes."""

    tokenization: Tokenization
    is_trained: bool
    family: TextFamily | None = None
    """Of a model of the store, which the recipe does not tell."""


def check_rows(loaded: LoadedRecipe, store: Store | None = None) -> RowFindings:
    """Read the first rows of every source of text whose tokenizer the recipe, a folder or the store tells."""
    found = RowFindings()
    readers: dict[str, _Reader | None] = {}
    stages = loaded.recipe.stages
    for name, stage in loaded.recipe.stages.items():
        if not isinstance(stage, TextStage):
            continue
        source = origin(stage.text_start() or name, stages)
        key = repr(source)
        if key not in readers:
            try:
                readers[key] = _reader(loaded, source, store)
            except (RequestError, StoreDamaged):  # reported at the input itself
                readers[key] = None
        reader = readers[key]
        for use in stage.sources():
            if reader is None or use.is_derived or use.role == "images":
                continue
            _check_use(loaded, name, stage, use, reader, found)
    return found


def _check_use(
    loaded: LoadedRecipe, name: str, stage: TextStage, use: SourceUse, reader: _Reader, found: RowFindings
) -> None:
    family = reader.family or model_facts(loaded, stage).family
    if family is not None and family.tuning_role == "image_text":
        return
    role = row_roles(use, family)[0]
    layout = _layout(stage, use, role, reader.tokenization)
    try:
        rows = first_rows(use.rows, loaded.base_dir, role, NUM_ROWS)
        if not rows:
            return
        shown = next((row for row in rows if not row.reading.drop), rows[0])
        pieces = tuple(show_row(shown, layout))
        template = (
            layout.text.template if {"prompt", "messages"} & shown.columns.keys() and use.role != "text" else None
        )
        _, report = lay_out(layout, rows)
    except RequestError as error:
        found.problems.append(loaded.problem(Code.ROWS_NOT_USABLE, f"stages.{name}.{use.field_path}", "", str(error)))
        return
    unread = dict(report.unread)
    found.rows.append(StageRow(name, use.field_path, shown.id, template, pieces, dict(report.forms), unread))
    place = f"stages.{name}.{use.field_path}"
    found.warnings += _said_of_unread(place, report, unknown_roles(rows, layout.text.tokenization.chat_template))
    if not reader.is_trained:
        return
    limit = use.rows.max_dropped
    for text in report.lost(layout.text.sequence_length):
        if report.lost_share > WARN_LOST:
            ends = f"; a run stops above max_dropped ({limit:g})" if report.dropped_share > limit else ""
            found.warnings.append(f"{place}: of its first rows {text}{ends}")


def _said_of_unread(place: str, report: BuildReport, roles: Mapping[str, int]) -> Iterator[str]:
    """Warn of what rows hold for the model and nothing reads, and of roles that no template is known to have."""
    for name, count in report.unread.items():
        has = f"{count} of its first {report.rows_in} rows"
        if name in TOLD_TO_MODEL or "." in name:
            by = " by the model's chat template" if "." in name or name == "tools" else ""
            yield f"{place}: {name} is not read{by}; {has} have it"
    for role, count in roles.items():
        has = f"{count} of its first {report.rows_in} rows"
        yield f"{place}: turns of role {role!r} in {has}; the template does not name it"


def _reader(loaded: LoadedRecipe, source: Pretrain | Reference | None, store: Store | None) -> _Reader | None:
    tokenizer = source.tokenizer if isinstance(source, Pretrain) else None
    if isinstance(tokenizer, TrainTokenizer):
        return _Reader(train_tokenizer(tokenizer, []), is_trained=False)
    overrides = tokenizer if isinstance(tokenizer, ExistingTokenizer) else None
    reference = parse_reference(overrides.from_) if overrides is not None else source
    match reference:
        case FolderRef():
            return _Reader(load_tokenization(Path(loaded.base_dir / reference.path), overrides), is_trained=True)
        case StoreRef() if store is not None:
            return _stored_reader(store.resolve(reference.name_or_fingerprint), store, overrides)
    return None


def _stored_reader(artifact: ArtifactManifest, store: Store, overrides: ExistingTokenizer | None) -> _Reader:
    prefix = next((f"{part}/" for part in ("model", "actor") if f"{part}/tokenizer.json" in artifact.files), "")
    names = [name for name in TOKENIZER_FILES if prefix + name in artifact.files]
    files = {name: store.objects.get_bytes(artifact.files[prefix + name].sha256) for name in names}
    family = MODEL_TYPES.get(str((artifact.architecture or {}).get("model_type")))
    return _Reader(tokenization_from_files(files, overrides), is_trained=True, family=family)


def _layout(stage: TextStage, use: SourceUse, role: RowRole, tokenization: Tokenization) -> TextLayout:
    template = stage.own_template or default_template(cast(Role, role), tokenization.chat_template is not None)
    settings = TextSettings(tokenization, stage.text_length(use), loss_on=stage.counted_tokens, template=template)
    return text_layout(role, settings, use.carried)


def _shortened(text: str) -> str:
    written = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    if len(written) <= SHOWN_CHARACTERS:
        return written
    half = SHOWN_CHARACTERS // 2
    return f"{written[:half]} ... {written[-half:]}"
