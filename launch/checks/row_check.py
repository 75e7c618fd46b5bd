"""What `check` reports about the first rows of each source: one row as the model gets it, and how many are usable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.checks.stage_sources import StageSource, stage_sources
from recipes.errors import Problem, RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.stages.answers import ROLES
from trainers.data.dataset import WARN_LOST, BuildReport
from trainers.data.first_rows import Piece, filtered, first_rows, show_row
from trainers.data.image_processor import CountedImages, ImageTokens
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.registry import TextLayout
from trainers.data.materialise import lay_out
from trainers.data.rows import Row, unknown_roles
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
    filtered: dict[str, int]
    """Why filters leave some of the first rows out, and how many."""
    read: int
    """The first rows."""

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
        if self.filtered:
            counts = ", ".join(f"{reason} {count}" for reason, count in self.filtered.items())
            yield f"  left out by filters of the first {self.read} rows: {counts}"
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


def check_rows(loaded: LoadedRecipe, store: Store | None = None, known: Sequence[Problem] = ()) -> RowFindings:
    """Read the first rows of every source of text whose tokenizer the recipe, a folder or the store tells.

    Sources in which problems are `known` are left out.
    """
    found = RowFindings()
    for source in stage_sources(loaded, store):
        if not any(f"{problem.field}.".startswith(f"{source.place}.") for problem in known):
            _check_source(loaded, source, found)
    return found


def _check_source(loaded: LoadedRecipe, source: StageSource, found: RowFindings) -> None:
    use, layout, place = source.use, source.layout, source.place
    template = layout.text.tokenization.chat_template
    try:
        read = first_rows(use.plain, loaded.base_dir, source.role, NUM_ROWS)
        rows, left_out = filtered(read, use.plain, loaded.base_dir, source.known_tokenization)
        if read and not rows:
            found.warnings.append(f"{place}: its filters leave none of its first {len(read)} rows")
        if not rows:
            return
        shown = next((row for row in rows if not row.reading.drop), rows[0])
        pieces = tuple(show_row(shown, layout))
        contents, report = lay_out(layout, rows)
        if contents.learns_nothing and source.is_trained and len(rows) < NUM_ROWS:  # these are all rows
            raise RequestError(report.nothing_to_learn(layout.text.sequence_length))
        found.warnings += _said_of_tokens(place, shown, layout)
    except RequestError as error:
        found.problems.append(loaded.problem(Code.ROWS_NOT_USABLE, place, "", str(error)))
        return
    is_asked = {"prompt", "messages"} & shown.columns.keys() and not use.facts.is_plain
    asked = layout.text.template if is_asked else None
    unread = dict(report.unread)
    found.rows.append(
        StageRow(
            *(source.stage, use.field_path, shown.id, asked, pieces, dict(report.forms), unread),
            dict(left_out.counts),
            len(read),
        )
    )
    if isinstance(layout, ImageText):
        found.warnings += _said_of_images(place, rows, layout.processor)
    found.warnings += _said_of_unread(place, report, unknown_roles(rows, template))
    if not source.is_trained or report.lost_share <= WARN_LOST:
        return
    limit = use.rows.max_dropped
    ends = f"; a run stops above max_dropped ({limit:g})" if report.dropped_share > limit else ""
    found.warnings += [f"{place}: of its first rows {text}{ends}" for text in report.lost(layout.text.sequence_length)]


def _said_of_tokens(place: str, row: Row, layout: TextLayout) -> Iterator[str]:
    """Warn of what stands wrong in the tokens of a row: an end token before the answer, two beginnings."""
    tokenization, asked = layout.text.tokenization, layout.text.ask(row).columns
    if row.reading.drop or "prompt" not in asked or ROLES[layout.role].has_targets:
        return
    ids = tokenization.encode_prompt(asked["prompt"])
    name = tokenization.decode(ids[-1:], skip_special=False)
    if ids and ids[-1] in tokenization.end_ids:
        yield f"{place}: the prompt of {row.id} ends with {name}, which also ends answers: nothing starts the answer"
    if len(ids) > 1 and tokenization.bos_id is not None and ids[0] == ids[1] == tokenization.bos_id:
        yield f"{place}: the prompt of {row.id} starts with {tokenization.bos_token} twice"


def _said_of_images(place: str, rows: Sequence[Row], processor: ImageTokens) -> Iterator[str]:
    """Warn where only the processor itself knows how many tokens images take."""
    if isinstance(processor, CountedImages) and processor.facts.tokens(1, 1) is None:
        images = sum(len(row.columns["images"]) for row in rows)
        yield (
            f"{place}: how many tokens its images take is not known before they are processed ({images} in its first "
            f"{len(rows)} rows); rows that are too long with them are dropped then"
        )


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


def _shortened(text: str) -> str:
    written = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    if len(written) <= SHOWN_CHARACTERS:
        return written
    half = SHOWN_CHARACTERS // 2
    return f"{written[:half]} ... {written[-half:]}"
