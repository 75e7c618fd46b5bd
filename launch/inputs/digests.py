"""Digests of a recipe's data."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from recipes.errors import TrainwrightError
from recipes.models.architecture import MODEL_TYPES
from recipes.recipe import Recipe
from recipes.references import StageRef, parse_reference
from recipes.stages.answers import SourceUse
from trainers.data.image_text_digest import image_text_digest
from trainers.data.source_digest import source_digest
from trainers.store.manifest import ArtifactManifest

VISION_TYPES = tuple(name for name, family in MODEL_TYPES.items() if family.reads_images)


def data_digests(
    recipe: Recipe, base_dir: Path, external: Mapping[str, Mapping[str, ArtifactManifest]]
) -> tuple[dict[str, dict[str, str]], list[tuple[str, str, str]]]:
    """Digest of every source by stage and field, and (field path, found, message) of those that cannot be read.

    Rows for a vision-language model count with the files of the images that they name.
    """
    known: dict[tuple[str, bool], str] = {}
    digests: dict[str, dict[str, str]] = {name: {} for name in recipe.stages}
    wrong: list[tuple[str, str, str]] = []
    for name, use, names_images in source_uses(recipe, external):
        key = (use.source.model_dump_json(), names_images)
        try:
            if key not in known:
                known[key] = (
                    image_text_digest(use.rows, base_dir) if names_images else source_digest(use.source, base_dir)
                )
            digests[name][use.field_path] = known[key]
        except TrainwrightError as error:
            wrong.append((f"stages.{name}.{use.field_path}", use.source.source, str(error)))
    return digests, wrong


def source_uses(
    recipe: Recipe, external: Mapping[str, Mapping[str, ArtifactManifest]]
) -> Iterator[tuple[str, SourceUse, bool]]:
    """Every stage with each of its sources, and whether rows name images, as those for a vision-language model do."""
    for name, stage in recipe.stages.items():
        for use in stage.sources():
            yield name, use, use.facts.is_tuning and _model_type(name, recipe, external) in VISION_TYPES


def _model_type(stage: str, recipe: Recipe, external: Mapping[str, Mapping[str, ArtifactManifest]]) -> str | None:
    """The type of the model from outside the recipe that a stage starts from in the end; None: it is built here."""
    seen: set[str] = set()
    while stage not in seen:
        seen.add(stage)
        text = recipe.stages[stage].text_start()
        reference = None if text is None else parse_reference(text)
        if not isinstance(reference, StageRef):
            found = external.get(stage, {}).get("init_from")
            kind = None if found is None else (found.architecture or {}).get("model_type")
            return kind if isinstance(kind, str) else None
        stage = reference.stage
    return None
