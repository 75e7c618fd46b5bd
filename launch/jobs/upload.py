"""Data files of a submitted run in the store, by content.

What a stage computes depends on the files' bytes and order alone, so an uploaded run has the fingerprints that a run on
the files themselves has, and finds what such a run has made.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.inputs.data_files import LocalSource, set_keys
from launch.inputs.digests import source_uses
from launch.inputs.resolved import Resolved
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loading.load import parse_recipe
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from trainers.data.source_files import below
from trainers.store.background_threads import map_beside
from trainers.store.manifest import DatasetManifest, FileEntry, canonical_json
from trainers.store.store import Store

UPLOADS_AT_ONCE = 4


def upload(resolved: Resolved, sources: Sequence[LocalSource], store: Store) -> Resolved:
    """Put the sources' files into the store; returns the recipe that reads them from there.

    Raises RecipeError for files that cannot be read elsewhere, as rows name them by absolute paths.
    """
    if not sources:
        return resolved
    _require_movable(resolved, sources)
    files: dict[str, Path] = {}
    keys: dict[tuple[str, bool], dict[str, Any]] = {}
    for number, source in enumerate(sources):
        files |= {f"{number}/{place}": path for place, path in source.found.files.items()}
        keys[source.key] = {key: below(str(number), value) for key, value in source.found.keys.items()}
    entries = dict(zip(files, map_beside(store.objects.put_file, files.values(), UPLOADS_AT_ONCE), strict=True))
    digest = _digest(entries)
    try:
        manifest = DatasetManifest(digest=digest, files=entries)
    except ValidationError as error:
        raise RequestError(f"data files cannot be uploaded: {error.errors()[0]['msg']}") from None
    store.put_dataset(manifest)
    uploaded = replace(resolved, recipe=_with_keys(resolved, keys), uploaded=digest)
    before, after = ([stage.fingerprint for stage in each.plan(None).stages] for each in (resolved, uploaded))
    assert before == after, "an upload changed what is computed"
    return uploaded


def note_upload(store: Store, run: str, resolved: Resolved) -> None:
    """Write down that a run's stages use its uploaded files, so that no collection takes them."""
    if resolved.uploaded is not None:
        for stage in resolved.plan(None).stages:
            store.note_datasets(run, stage.fingerprint)
            store.find_dataset(resolved.uploaded)


def _require_movable(resolved: Resolved, sources: Sequence[LocalSource]) -> None:
    message = "rows name this file by a path that leads nowhere once the files are uploaded"
    advice = "name it by a path relative to the rows' file, or put the data where every node sees it"
    problems = [
        Problem(Code.NOT_UPLOADABLE, resolved.source, None, source.field, source.found.immovable[0], message, advice)
        for source in sources
        if source.found.immovable
    ]
    if problems:
        raise RecipeError(problems)


def _digest(entries: Mapping[str, FileEntry]) -> str:
    content = {name: entry.sha256 for name, entry in entries.items()}
    return hashlib.sha256(canonical_json({"uploaded": content})).hexdigest()


def _with_keys(resolved: Resolved, keys: Mapping[tuple[str, bool], Mapping[str, Any]]) -> Recipe:
    raw = resolved.recipe_json
    for name, use, names_images in source_uses(resolved.recipe, resolved.external):
        own = raw["stages"][name].get(use.field_path)
        moved = keys.get((use.source.model_dump_json(), names_images))
        if moved is not None and isinstance(own, dict):
            set_keys(own, moved)
    return parse_recipe(raw)
