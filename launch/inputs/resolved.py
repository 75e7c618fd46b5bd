"""A recipe whose inputs are fixed, as `recipe.json` of a run holds it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.inputs.external import external_of
from recipes.data.images import ImageSetFacts
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loading.load import dump_recipe, parse_recipe
from recipes.planning.cost import Rates
from recipes.planning.fingerprint import ParentId, stage_meaning
from recipes.planning.memory import Sizes
from recipes.planning.plan import Committed, Plan, build_plan
from recipes.planning.prediction import External, Known, predict_stage
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import StageRef, parse_reference
from recipes.rules.chain import image_stage_of
from recipes.stages.batch import micro_batches
from recipes.stages.kinds import Stage
from trainers.data.images import find_image_set_facts
from trainers.models.counting import counted_model
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

FORMAT = 1


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
    """Stage -> its fingerprints before those changes: training resumes from their states."""
    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> its fingerprints before an input changed: their training states are unusable."""
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

    def plan(self, store: Store | None, rates: Rates | None = None) -> Plan:
        """The plan, and which stages the store has (None: none of them); `rates` is what a worker gets done."""

        def find(fingerprint: str) -> Committed | None:
            found = None if store is None else store.find_artifact(fingerprint)
            if found is None:
                return None
            return Committed(found.digest, {path: parent.digest for path, parent in found.parents.items()})

        workers = self.recipe.cluster.workers
        assert workers != "auto"
        try:
            return build_plan(
                self.recipe,
                workers=workers,
                data=self.data,
                externals=self._externals(),
                find=find,
                changes=self.changes,
                images=self._images(),
                settled_by=self.settled_by,
                rates=rates,
                count=counted_model,
            )
        except ValueError as error:
            raise RecipeError(
                [Problem(Code.BATCH_NOT_DIVISIBLE, self.source, None, "cluster.workers", str(workers), str(error))]
            ) from None

    def sizes_of(self, name: str, stage: Stage, workers: int) -> Sizes | None:
        """What a stage of this name would take with other settings on so many workers."""
        recipe = self.recipe.changed(stages={**self.recipe.stages, name: stage})
        batch, micro = stage.batch(), 1
        if batch is not None:
            micro, _ = micro_batches(batch.size, workers, stage.shard.micro_batch, at_most=stage.largest_micro_batch)
        known = Known(recipe, self._externals(), self._images().get(name), counted_model)
        return predict_stage(stage, known, workers, micro).sizes

    def _externals(self) -> dict[str, dict[str, External]]:
        return {
            stage: {
                path: external_of(artifact, self.part_of(stage, path), self.text_of(stage, path))
                for path, artifact in inputs.items()
            }
            for stage, inputs in self.external.items()
        }

    def _images(self) -> dict[str, ImageSetFacts]:
        """Size of each stage's images, where headers tell it."""
        return {
            name: facts
            for name, stage in self.recipe.stages.items()
            if (source := image_stage_of(stage, self.recipe.stages)) is not None
            and (facts := find_image_set_facts(source.data, self.base_dir)) is not None
        }

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
