"""Uploaded data files of a run, read from the store."""

from collections.abc import Mapping
from pathlib import Path

from launch.inputs.data_files import location_keys, places, set_keys
from launch.inputs.resolved import Resolved
from recipes.errors import RequestError, StoreDamaged
from recipes.loading.load import dump_recipe, parse_recipe
from recipes.recipe import Recipe
from recipes.stages.kinds import Stage
from trainers.store.store import Store


def uploaded_folder(store: Store, digest: str, stage: Stage) -> Path | None:
    """A local folder with the uploaded files that a stage reads, hash-checked; None for a stage that reads none."""
    numbers = {place.partition("/")[0] for use in stage.sources() for place in places(use.source)}
    manifest = store.find_dataset(digest)
    if manifest is None:
        raise StoreDamaged(f"store {store.uri} no longer holds the uploaded data files ({digest[:12]}); submit again")
    files = {name: entry for name, entry in manifest.files.items() if name.partition("/")[0] in numbers}
    return store.folder(manifest.model_copy(update={"files": files})) if files else None


def with_uploaded(resolved: Resolved, recipe: Recipe, data: Mapping[str, Mapping[str, str]]) -> Recipe:
    """The recipe, with its local files replaced by the run's uploaded ones wherever the digests are equal."""
    raw = dump_recipe(recipe)
    for name, stage in resolved.recipe.stages.items():
        for use in stage.sources():
            own = raw["stages"].get(name, {})
            for part in use.field_path.split("."):
                own = own.get(part) if isinstance(own, dict) else None
            if isinstance(own, dict) and data.get(name, {}).get(use.field_path) == resolved.data[name][use.field_path]:
                set_keys(own, location_keys(use.source))
    return parse_recipe(raw)


def require_uploaded(run: str, resolved: Resolved, wanted: Resolved) -> None:
    """Raise RequestError, naming the field, where a resume of an uploaded run would read other files."""
    for name, stage in wanted.recipe.stages.items():
        known = {use.field_path: use.source for use in resolved.recipe.stages[name].sources()}
        for use in stage.sources():
            if use.field_path not in known or places(use.source) != places(known[use.field_path]):
                found = ", ".join(places(use.source)) or use.source.source
                raise RequestError(
                    f"{run} is not resumed: its data files were uploaded, and stages.{name}.{use.field_path} reads "
                    f"others: {found}; submit it as a new run"
                )
