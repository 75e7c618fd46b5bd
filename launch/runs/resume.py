"""Whether a run can continue, and with which recipe: placement may change, meaning may not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.capacity.nodes import nodes_of
from launch.capacity.workers import settle_workers
from launch.checks.preflight import check as check
from launch.inputs.changes import Change, changed_meaning
from launch.inputs.data_check import load_checked
from launch.inputs.digests import data_digests
from launch.inputs.resolved import Resolved
from launch.inputs.uploaded import require_uploaded, with_uploaded
from launch.records.record import RunRecord
from launch.records.standing import standing
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loading.load import parse_recipe
from recipes.loading.yaml_text import parse_yaml
from recipes.planning.settle import keep_settled
from recipes.problem_codes import Code
from recipes.recipe import Recipe


def resumable(
    record: RunRecord,
    recipe: str | Path | None,
    overrides: Sequence[str],
    address: str | None,
    allowed: Sequence[str] = (),
) -> Resolved | None:
    """The resolved recipe to continue with; None when the run is complete.

    Raises RequestError that lists every changed field of the meaning which `allowed` does not name.
    """
    summary = standing(record)
    if summary.state in ("running", "submitted"):
        host = summary.driver.get("host", "the cluster")
        raise RequestError(f"{record.run} is {summary.state} on {host}; stop it first: trainwright stop {record.run}")
    raw, resolved = record.raw, record.resolved()
    if overrides or recipe is not None:
        wanted = with_placement(resolved, recipe, overrides)
        if wanted.recipe.stages.keys() != resolved.recipe.stages.keys():
            names, found = ", ".join(resolved.recipe.stages), ", ".join(wanted.recipe.stages)
            raise RequestError(f"{record.run} is not resumed: it has the stages {names}, not {found}")
        if resolved.uploaded:
            require_uploaded(record.run, resolved, wanted)
        resolved = _settled(wanted, address or summary.address)
    is_same = not changed_meaning(raw["meanings"], resolved.meanings(resolved.plan(None)))
    if summary.state == "completed" and is_same and not allowed:
        return None
    digests = resolved.data if resolved.uploaded else _present_digests(resolved.recipe, resolved.base_dir, resolved)
    present = replace(resolved, data=digests)
    changed = changed_meaning(raw["meanings"], present.meanings(present.plan(None)))
    refused = [change for change in changed if not any(_covers(name, change.field) for name in allowed)]
    if refused:
        listed = "\n".join(f"  {change}" for change in refused)
        raise RequestError(
            f"{record.run} is not resumed: what it computes has changed\n{listed}\nstart a new run instead, or allow "
            f"each by --allow-change FIELD, which its artifacts will record"
        )
    for name in allowed:
        if not any(_covers(name, change.field) for change in changed):
            raise RequestError(f"--allow-change {name}: nothing changed there")
    return _with_changes(record, present, changed) if changed else resolved


def _present_digests(recipe: Recipe, base_dir: Path, run: Resolved) -> dict[str, dict[str, str]]:
    digests, wrong = data_digests(recipe, base_dir, run.external)
    if wrong:
        raise RecipeError(
            [Problem(Code.UNREADABLE_DATA, run.source, None, path, found, message) for path, found, message in wrong]
        )
    return digests


def _covers(allowed: str, field_path: str) -> bool:
    return field_path == allowed or field_path.startswith(f"{allowed}.")


def _with_changes(record: RunRecord, present: Resolved, changed: Sequence[Change]) -> Resolved:
    """Note allowed changes: a stage that has saved states continues from them under a new fingerprint."""
    before = {entry["name"]: str(entry["fingerprint"]) for entry in record.raw["plan"]}
    changes = {name: list(items) for name, items in present.changes.items()}
    for change in changed:
        if record.store.latest_state(record.run, change.stage, hashed=False) is not None:
            item = {"field": change.field, "before": change.before, "after": change.after, "run": record.run}
            changes.setdefault(change.stage, []).append(item)
    noted = replace(present, changes=changes)
    accepts = {name: list(items) for name, items in present.accepts.items()}
    replaced = {name: list(items) for name, items in present.replaced.items()}
    for stage in noted.plan(None).stages:
        if stage.fingerprint != before[stage.name]:
            is_continued = any(change.stage == stage.name for change in changed) and stage.name in changes
            (accepts if is_continued else replaced).setdefault(stage.name, []).append(before[stage.name])
    return replace(noted, accepts=accepts, replaced=replaced)


def with_placement(resolved: Resolved, recipe: str | Path | None, overrides: Sequence[str]) -> Resolved:
    """The resolved recipe with another file's settings, or with single settings, in their place."""
    if recipe is None:
        data = resolved.recipe_json
        for override in overrides:
            _set(data, override)
        return _settled_as(replace(resolved, recipe=parse_recipe(data)), resolved)
    loaded = load_checked(Path(recipe), overrides, resolved.smoke)
    wanted = loaded.recipe
    if resolved.uploaded:
        data = _present_digests(wanted, loaded.base_dir, resolved)
        wanted, resolved = with_uploaded(resolved, wanted, data), replace(resolved, data=data)
    settled = {
        name: getattr(resolved.recipe.cluster, name)
        for name in ("workers", "gpus_per_worker")
        if getattr(wanted.cluster, name) == "auto"
    }
    changed = wanted.model_copy(update={"cluster": wanted.cluster.model_copy(update=settled)})
    return _settled_as(replace(resolved, recipe=changed), resolved)


def _settled_as(changed: Resolved, before: Resolved) -> Resolved:
    """What `shard` leaves to `auto` stays what the run's start settled, wherever it is resumed."""
    recipe = keep_settled(changed.recipe, before.recipe)
    reasons = {
        name: found
        for name, found in before.settled_by.items()
        if name in recipe.stages and recipe.stages[name].shard == before.recipe.stages[name].shard
    }
    return replace(changed, recipe=recipe, settled_by=reasons)


def _settled(resolved: Resolved, address: str | None) -> Resolved:
    """Workers that are asked for as `auto` fitted to the place as it is at present."""
    cluster = resolved.recipe.cluster
    if "auto" not in (cluster.workers, cluster.gpus_per_worker):
        return resolved
    workers = settle_workers(resolved.recipe, nodes_of(address))
    found = {"workers": workers.num_workers, "gpus_per_worker": workers.gpus_per_worker}
    settled = cluster.model_copy(update=found)
    return replace(resolved, recipe=resolved.recipe.model_copy(update={"cluster": settled}))


def _set(data: Any, override: str) -> None:
    """Set one value of a resolved recipe: `cluster.workers=1`."""
    dotted, equals, text = override.partition("=")
    *outer, last = dotted.strip().split(".")
    if not equals or not last:
        raise RequestError(f"--set {override}: expected PATH=VALUE, for example cluster.workers=1")
    for part in outer:
        data = data.get(part) if isinstance(data, dict) else None
    if not isinstance(data, dict) or last not in data:
        raise RequestError(f"--set {override}: the run's recipe has no {dotted}")
    data[last] = parse_yaml(text, f"--set {override}", marked=False).value
