"""How many rows and tokens the sources of a recipe's text have, for `plan`."""

from collections.abc import Iterator

from launch.checks.stage_sources import StageSource, stage_sources
from launch.inputs.data_files import places
from recipes.errors import RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.planning.plan import SourceCount
from trainers.data.first_rows import filtered, first_rows
from trainers.data.materialise import lay_out
from trainers.data.selection import select
from trainers.store.store import Store

COUNTED_ROWS = 10_000
"""Rows of a source that are read."""
TOKENIZED_ROWS = 100
"""Rows of a source whose tokens are counted."""


def source_counts(loaded: LoadedRecipe, store: Store | None) -> Iterator[SourceCount]:
    """Count every source of text whose tokenizer is known or will be trained; what is wrong is left to `check`."""
    for source in stage_sources(loaded, store):
        if not places(source.use.source):
            continue  # what every installation has
        try:
            found = _count(source, loaded)
        except RequestError:
            continue
        if found is not None:
            yield found


def _count(source: StageSource, loaded: LoadedRecipe) -> SourceCount | None:
    use, layout = source.use, source.layout
    read = first_rows(use.plain, loaded.base_dir, source.role, COUNTED_ROWS + 1)
    if not read:
        return None
    is_whole = len(read) <= COUNTED_ROWS
    kept, _ = filtered(read[:COUNTED_ROWS], use.plain, loaded.base_dir, source.known_tokenization)
    limited = use.plain if is_whole else use.plain.changed(limit=None)
    rows = list(select(lambda: iter(kept), limited, loaded.recipe.seed, held_out=use.held_out))
    tokens = None
    if source.is_trained and rows:
        _, report = lay_out(layout, rows[:TOKENIZED_ROWS])
        tokens = round(report.holds["tokens"] / min(len(rows), TOKENIZED_ROWS) * len(rows))
    return SourceCount(source.place.removeprefix("stages."), source.name, len(rows), tokens, is_whole)
