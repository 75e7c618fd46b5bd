"""From a validated recipe to fixed inputs: artifacts for references that leave it, digests for data, worker counts.

What is resolved is written into the run's `recipe.json`; a resume reads it from there and never looks again at a name,
a hub or a folder. Data files are looked at again, and a difference is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launch.capacity.workers import Workers
from launch.inputs.data_check import DataCheck
from launch.inputs.digests import data_digests
from launch.inputs.external import find_input, wrong_kind
from launch.inputs.resolved import Resolved
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.planning.memory import Sizes
from recipes.planning.settle import Hardware, settle_shards
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import Reference, parse_reference
from recipes.rules.static import check_static
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

NOT_FOR_PLANS = (Code.MISSING_MODEL_FILE,)
"""What a plan can do without: it needs no more of a model than its configuration."""


def resolve(
    loaded: LoadedRecipe,
    store: Store,
    workers: Workers,
    hardware: Hardware,
    *,
    fetches: bool = False,
    only_plans: bool = False,
) -> Resolved:
    """Fix every input, and what `shard` leaves to `auto`; raises RecipeError with all that cannot be resolved.

    Nothing is written to the store; a run takes its inputs in by `external.take_in`. With `fetches`, which a run needs,
    hub models are downloaded whole. A plan alone does with folders that hold no more than a `config.json`.
    """
    external, problems = _find_inputs(loaded, store, fetches=fetches, only_plans=only_plans)
    configs: dict[Reference, Mapping[str, Any]] = {
        parse_reference(item.text): external[name][item.field_path].architecture or {}
        for name, stage in loaded.recipe.stages.items()
        for item in stage.inputs()
        if item.field_path in external.get(name, {})
    }
    if configs:
        known = replace(loaded, configs=configs)
        found_there = [*check_static(known), *DataCheck()(known)]
        problems += [problem for problem in found_there if not only_plans or problem.code not in NOT_FOR_PLANS]
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


def _find_inputs(
    loaded: LoadedRecipe, store: Store, *, fetches: bool, only_plans: bool
) -> tuple[dict[str, dict[str, ArtifactManifest]], list[Problem]]:
    """Inputs from outside the recipe by stage and field, and what is wrong with the others."""
    problems: list[Problem] = []
    external: dict[str, dict[str, ArtifactManifest]] = {}
    found: dict[tuple[str, tuple[str, ...]], ArtifactManifest | None] = {}
    for name, stage in loaded.recipe.stages.items():
        for item in stage.inputs():
            key, place = (item.text, item.wants), f"stages.{name}.{item.field_path}"
            try:
                if key not in found:
                    found[key] = find_input(*key, loaded.base_dir, store, fetches=fetches, only_plans=only_plans)
            except (RequestError, RecipeError) as error:
                problems.append(loaded.problem(Code.INPUT_NOT_FOUND, place, item.text, str(error)))
                continue
            artifact = found[key]
            if artifact is None:
                continue
            finding = wrong_kind(*key, artifact)
            if finding is not None:
                problems.append(loaded.problem_from(finding, place, item.text))
            else:
                external.setdefault(name, {})[item.field_path] = artifact
    return external, problems
