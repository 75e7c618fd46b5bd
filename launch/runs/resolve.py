"""From a validated recipe to fixed inputs: artifacts for references that leave it, digests for data, worker counts.

What is resolved is written into the run's `recipe.json`; a resume reads it from there and never looks again at a name,
a hub or a folder. Data files are looked at again, and a difference is refused.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.checks.data import DataCheck
from launch.runs.capacity import Workers
from launch.runs.inputs import external_of, find_input, wrong_kind
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import Problem, RecipeError, RequestError, TrainwrightError
from recipes.loading.load import LoadedRecipe, dump_recipe, parse_recipe
from recipes.models.architecture import MODEL_TYPES
from recipes.models.memory import Sizes
from recipes.planning.fingerprint import ParentId, stage_meaning
from recipes.planning.plan import Committed, Plan, build_plan
from recipes.planning.settle import Hardware, settle_shards
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import Reference, StageRef, parse_reference
from recipes.rules.chain import image_stage_of
from recipes.rules.static import check_static
from recipes.stages.answers import SourceUse
from trainers.data.image_text_digest import image_text_digest
from trainers.data.images import find_image_set_facts
from trainers.data.sources.open import open_source
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

FORMAT = 1
VISION_TYPES = tuple(name for name, family in MODEL_TYPES.items() if family.tuning_role == "image_text")


@dataclass(frozen=True)
class Resolved:
    """A recipe whose inputs are fixed."""

    recipe: Recipe
    base_dir: Path
    external: dict[str, dict[str, ArtifactManifest]] = field(default_factory=dict)
    """Stage -> input field path -> artifact, for references that leave the recipe."""
    data: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stage -> data field -> digest."""
    source: str = ""
    """The recipe's file, for messages."""
    smoke: bool = False
    changes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Stage -> settings that a resume was allowed to change while it was under way: field, before, after, run."""
    accepts: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> its fingerprints before those changes: their training states are gone on from."""
    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> its fingerprints before an input changed: their training states are of no use."""
    uploaded: str | None = None
    """Digest of the data files in the store that the recipe's sources read; None: they read files by their paths."""
    settled_by: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stage -> field of its shard -> why `auto` came to what the recipe holds."""

    @property
    def recipe_json(self) -> dict[str, Any]:
        """The recipe with every default written out."""
        return dump_recipe(self.recipe)

    @property
    def internal(self) -> dict[str, dict[str, StageRef]]:
        """Stage -> input field path -> the stage of this recipe that is named there."""
        return {
            name: {
                item.field_path: reference
                for item in stage.inputs()
                if isinstance(reference := parse_reference(item.text), StageRef)
            }
            for name, stage in self.recipe.stages.items()
        }

    def text_of(self, stage: str, field_path: str) -> str:
        """What the recipe has at an input."""
        return next(item.text for item in self.recipe.stages[stage].inputs() if item.field_path == field_path)

    def part_of(self, stage: str, field_path: str) -> str | None:
        """The part that an input names."""
        return getattr(parse_reference(self.text_of(stage, field_path)), "part", None)

    def meanings(self, plan: Plan) -> dict[str, dict[str, Any]]:
        """What each stage's fingerprint is the hash of."""
        return {
            stage.name: stage_meaning(
                stage.name,
                self.recipe,
                {path: ParentId(item.fingerprint, "", item.part) for path, item in stage.inputs.items()},
                self.data.get(stage.name, {}),
                self.changes.get(stage.name, ()),
            )
            for stage in plan.stages
        }

    def plan(self, store: Store | None) -> Plan:
        """The plan, and which stages the store has; None: none of them."""

        def find(fingerprint: str) -> Committed | None:
            found = None if store is None else store.find_artifact(fingerprint)
            if found is None:
                return None
            return Committed(found.digest, {path: parent.digest for path, parent in found.parents.items()})

        workers = self.recipe.cluster.workers
        assert workers != "auto"
        externals = {
            stage: {
                path: external_of(artifact, self.part_of(stage, path), self.text_of(stage, path))
                for path, artifact in inputs.items()
            }
            for stage, inputs in self.external.items()
        }
        images = {
            name: facts
            for name, stage in self.recipe.stages.items()
            if (source := image_stage_of(stage, self.recipe.stages)) is not None
            and (facts := find_image_set_facts(source.data, self.base_dir)) is not None
        }
        try:
            return build_plan(
                self.recipe,
                workers=workers,
                data=self.data,
                externals=externals,
                find=find,
                changes=self.changes,
                images=images,
                settled_by=self.settled_by,
            )
        except ValueError as error:
            raise RecipeError(
                [Problem(Code.BATCH_NOT_DIVISIBLE, self.source, None, "cluster.workers", str(workers), str(error))]
            ) from None

    def to_json(self) -> dict[str, Any]:
        """The form of `recipe.json`."""
        return {
            "format": FORMAT,
            "type": "resolved_recipe",
            "recipe": self.recipe_json,
            "base_dir": str(self.base_dir),
            "source": self.source,
            "smoke": self.smoke,
            "inputs": {
                stage: {path: manifest.model_dump(mode="json") for path, manifest in inputs.items()}
                for stage, inputs in self.external.items()
            },
            "data": self.data,
            "changes": self.changes,
            "accepts": self.accepts,
            "replaced": self.replaced,
            "uploaded": self.uploaded,
            "settled_by": self.settled_by,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Resolved":
        """Read what `to_json` gave."""
        if raw.get("type") != "resolved_recipe" or raw.get("format") != FORMAT:
            raise RequestError(f"not a resolved recipe of format {FORMAT}: {raw.get('type')!r} {raw.get('format')!r}")
        return cls(
            recipe=parse_recipe(raw["recipe"]),
            base_dir=Path(raw["base_dir"]),
            external={
                stage: {path: ArtifactManifest.model_validate_json(json.dumps(item)) for path, item in inputs.items()}
                for stage, inputs in raw["inputs"].items()
            },
            data=raw["data"],
            source=raw["source"],
            smoke=raw["smoke"],
            changes=raw.get("changes", {}),
            accepts=raw.get("accepts", {}),
            replaced=raw.get("replaced", {}),
            uploaded=raw.get("uploaded"),
            settled_by=raw.get("settled_by", {}),
        )


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
                known[key] = image_text_digest(use.rows, base_dir) if names_images else digest_of(use.source, base_dir)
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
            yield name, use, use.role == "instructions" and _model_type(name, recipe, external) in VISION_TYPES


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


def digest_of(source: Source | ImageSource, base_dir: Path) -> str:
    """The digest of a source of text or of images."""
    return open_source(source, base_dir).digest()


def resolve(
    loaded: LoadedRecipe, store: Store, workers: Workers, hardware: Hardware, *, fetches: bool = False
) -> Resolved:
    """Fix every input, and what `shard` leaves to `auto`; raises RecipeError with all that cannot be resolved.

    Nothing is written to the store; a run takes its inputs in by `inputs.take_in`. With `fetches`, which a run needs,
    hub models are downloaded whole.
    """
    problems: list[Problem] = []
    external: dict[str, dict[str, ArtifactManifest]] = {}
    configs: dict[Reference, Mapping[str, Any]] = {}
    found: dict[tuple[str, tuple[str, ...]], ArtifactManifest | None] = {}
    for name, stage in loaded.recipe.stages.items():
        for item in stage.inputs():
            key = (item.text, item.wants)
            try:
                if key not in found:
                    found[key] = find_input(*key, loaded.base_dir, store, fetches=fetches)
            except (RequestError, RecipeError) as error:
                problems.append(
                    loaded.problem(Code.INPUT_NOT_FOUND, f"stages.{name}.{item.field_path}", item.text, str(error))
                )
                continue
            artifact = found[key]
            if artifact is None:
                continue
            finding = wrong_kind(*key, artifact)
            if finding is not None:
                problems.append(loaded.problem_from(finding, f"stages.{name}.{item.field_path}", item.text))
            else:
                external.setdefault(name, {})[item.field_path] = artifact
                configs[parse_reference(item.text)] = artifact.architecture or {}
    if configs:
        known = replace(loaded, configs=configs)
        problems += [*check_static(known), *DataCheck()(known)]
    reported = {problem.field for problem in problems}
    digests, wrong = data_digests(loaded.recipe, loaded.base_dir, external)
    problems += [
        loaded.problem(Code.UNREADABLE_DATA, path, found, message)
        for path, found, message in wrong
        if path not in reported
    ]
    if problems:
        raise RecipeError(problems)
    cluster = loaded.recipe.cluster.model_copy(
        update={"workers": workers.num_workers, "gpus_per_worker": workers.gpus_per_worker}
    )
    resolved = Resolved(
        recipe=loaded.recipe.model_copy(update={"cluster": cluster}),
        base_dir=loaded.base_dir.resolve(),
        external=external,
        data=digests,
        source=str(loaded.path),
        smoke=loaded.smoke,
    )

    def predict(recipe: Recipe) -> dict[str, Sizes | None]:
        return {stage.name: stage.sizes for stage in replace(resolved, recipe=recipe).plan(None).stages}

    settled = settle_shards(resolved.recipe, hardware, workers.num_workers, predict)
    return replace(resolved, recipe=settled.recipe, settled_by=settled.reasons)


@dataclass(frozen=True)
class Change:
    """One field of a stage's meaning that differs from the run's."""

    stage: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.before)} in the run, {_short(self.after)} at present"


def differing_values(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """What differs between two nested mappings, by dotted name."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_values(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(Change("", f"{prefix}{key}", old, new))
    return found


def changed_meaning(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """What differs in the stages' own meaning; a parent's difference is told at the parent alone."""
    found = []
    for stage in sorted(before.keys() | after.keys()):
        own_before = {key: value for key, value in before.get(stage, {}).items() if key != "parents"}
        own_after = {key: value for key, value in after.get(stage, {}).items() if key != "parents"}
        for item in differing_values(own_before, own_after, f"stages.{stage}."):
            found.append(Change(stage, item.field.replace(".settings.", ".", 1), item.before, item.after))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
