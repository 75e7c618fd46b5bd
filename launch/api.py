"""The Python calls behind the commands; each raises a `recipes.errors.TrainwrightError` that carries the exit code.

import launch
result = launch.run("recipes/quickstart.yaml", overrides=["stages.policy.ppo.kl_coef=0.1"])
print(result.stages["exam"].manifest.metrics)
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch.checks.data import load_checked
from launch.checks.nodes import nodes_of
from launch.checks.preflight import CheckResult
from launch.checks.preflight import check as check
from launch.jobs.upload import require_uploaded, with_uploaded
from launch.report.progress import SilentView, View
from launch.runs.capacity import check_memory, hardware_of, settle_workers
from launch.runs.execute_plan import StageResult
from launch.runs.execute_run import Driven, drive
from launch.runs.journal import FINISHED, RunSummary
from launch.runs.new_run import new_record, record_of
from launch.runs.records import RunRecord, all_runs
from launch.runs.resolve import Change, Resolved, changed_meaning, data_digests, resolve
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loading.load import LoadedRecipe, parse_recipe
from recipes.loading.yaml_text import parse_yaml
from recipes.planning.plan import Plan
from recipes.planning.settle import keep_settled
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from trainers.store.background_threads import map_requests
from trainers.store.store import Store

__all__ = [
    "CheckResult", "RunResult", "check", "draw", "plan", "report", "resume", "run", "sample", "score", "status", "stop",
    "submit",
]  # fmt: skip

STOP_WAIT_S = 120.0


@dataclass(frozen=True)
class RunResult:
    """A run that reached its end."""

    run: str
    store: str
    stages: dict[str, StageResult]
    report: str | None


def prepare(
    recipe: str | Path, overrides: Sequence[str], smoke: bool, store: Store, address: str | None, *, fetches: bool
) -> Resolved:
    """Load, check and resolve a recipe for a place."""
    loaded = load_checked(Path(recipe), overrides, smoke)
    return resolve_for(loaded, store, address, fetches=fetches)


def resolve_for(loaded: LoadedRecipe, store: Store, address: str | None, *, fetches: bool) -> Resolved:
    """Fix a recipe's inputs and its number of workers; raises CapacityError where they cannot be or lack memory."""
    nodes = nodes_of(address)
    workers = settle_workers(loaded.recipe, nodes)
    resolved = resolve(loaded, store, workers, hardware_of(nodes, workers), fetches=fetches)
    check_memory(resolved.plan(store), workers, nodes)
    return resolved


def plan(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    store: str | None = None,
    address: str | None = None,
) -> Plan:
    """Stages in order, which of them the store has, and the predicted cost of the others."""
    opened = Store.open(store)
    return prepare(recipe, overrides, smoke, opened, address, fetches=False).plan(opened)


def run(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    store: str | None = None,
    address: str | None = None,
    view: View | None = None,
) -> RunResult:
    """Run a recipe's chain to its end; stages that the store has are not run again."""
    view = view or SilentView()
    view.say(f"{recipe}{' (smoke)' if smoke else ''}")
    if address is not None and urlsplit(address).scheme in ("http", "https"):
        raise RequestError(f"--address {address} is a job server; use submit, or give the cluster's own address")
    opened = Store.open(store)
    resolved = prepare(recipe, overrides, smoke, opened, address, fetches=True)
    record = new_record(opened, resolved)
    return _finish(record, drive(record, resolved, address, view))


def _finish(record: RunRecord, driven: Driven) -> RunResult:
    return RunResult(record.run, record.store.uri, driven.results, driven.report)


def drive_submitted(run: str, *, store: str | None, address: str | None, view: View) -> RunResult:
    """Drive a run whose folder another machine has written."""
    record = RunRecord.open(Store.open(store), run)
    return _finish(record, drive(record, record.resolved(), address, view))


def resume(
    run: str,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_change: Sequence[str] = (),
    store: str | None = None,
    address: str | None = None,
    view: View | None = None,
) -> RunResult:
    """Continue a run from its last saved state; what it computes must not have changed, but for `allow_change`."""
    view = view or SilentView()
    record = RunRecord.open(Store.open(store), run)
    resolved = resumable(record, recipe, overrides, address, allow_change)
    if resolved is None:
        summary = record.summary()
        view.say(f"{record.run} is {summary.state} already; there is nothing to resume")
        results = {}
        planned = record.resolved().plan(record.store)
        for stage in planned.stages:
            manifest = record.store.find_artifact(stage.fingerprint)
            if manifest is not None:
                results[stage.name] = StageResult(stage.name, stage.kind, True, manifest, 0.0, 0)
        return RunResult(record.run, record.store.uri, results, summary.report)
    from launch.jobs.job_server import is_job_server
    from launch.jobs.submit import find_server, hand_over

    address = address or record.summary().address
    server = find_server(resolved, record.store, str(address), view.say) if is_job_server(address) else None
    if resolved != record.resolved():
        record.revise(record_of(resolved))
    for name, changes in resolved.changes.items() if allow_change else ():
        for change in changes:
            view.say(f"{name} continues with {change['field']}: {change['before']} -> {change['after']}")
    if server is not None:
        hand_over(record, server)
        view.say(f"{record.run} is submitted again to {address} with {_workers_text(resolved)}")
        return RunResult(record.run, record.store.uri, {}, None)
    view.say(f"resuming {record.run} with {_workers_text(resolved)}")
    return _finish(record, drive(record, resolved, address, view))


def _workers_text(resolved: Resolved) -> str:
    workers = resolved.recipe.cluster.workers
    return f"{workers} worker{'' if workers == 1 else 's'}"


def resumable(
    record: RunRecord,
    recipe: str | Path | None,
    overrides: Sequence[str],
    address: str | None,
    allowed: Sequence[str] = (),
) -> Resolved | None:
    """The resolved recipe to go on with; None when the run is complete.

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
    """Note allowed changes: stages that are under way go on under an id of their own, from the states they have."""
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


def status(run: str | None = None, *, store: str | None = None) -> list[RunSummary]:
    """How runs stand, oldest first; one run where it is named."""
    opened = Store.open(store)
    if run is not None:
        return [standing(RunRecord.open(opened, run))]
    return list(map_requests(standing, all_runs(opened), opened.files))


def standing(record: RunRecord) -> RunSummary:
    """How a run stands; for a submitted one the job server knows whether its driver still lives."""
    summary = record.summary()
    if summary.state in ("submitted", "running") and summary.submission and summary.address:
        from launch.jobs.job_server import job_end

        end = job_end(summary.address, summary.submission)
        if end is not None:
            # The run may have ended properly between the two questions.
            summary = record.summary()
            if summary.state in ("submitted", "running"):
                summary.state, summary.message = "lost", end
    return summary


def stop(run: str, *, store: str | None = None, wait: bool = True) -> RunSummary:
    """Ask a run to save its state and end; with `wait` return when it has."""
    record = RunRecord.open(Store.open(store), run)
    summary = standing(record)
    if summary.state in FINISHED or summary.state == "lost":
        raise RequestError(f"{record.run} is not running; it is {summary.state}")
    record.request_stop()
    if summary.state == "submitted" and summary.submission and summary.address:
        from launch.jobs.job_server import stop_job

        stop_job(summary.address, summary.submission)
    deadline = time.monotonic() + STOP_WAIT_S
    while wait and summary.state in ("running", "submitted"):
        if time.monotonic() > deadline:
            raise RequestError(
                f"{record.run} has not stopped within {STOP_WAIT_S:.0f} s; it may be saving a large state"
            )
        time.sleep(0.3)
        summary = standing(record)
    return summary


def report(run: str, *, store: str | None = None, output: str | Path | None = None) -> str:
    """Write a run's report page again; returns where it is."""
    from launch.report.collect import collect
    from launch.report.page import render

    record = RunRecord.open(Store.open(store), run)
    page = render(collect(record))
    if output is None:
        return record.write_report(page)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return os.fspath(path)


def submit(
    recipe: str | Path,
    *,
    address: str,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    store: str | None = None,
    is_upload: bool = False,
) -> str:
    """Hand a recipe to a cluster's job server, with `is_upload` its data files too; returns the run's id."""
    from launch.jobs.submit import submit as submit_recipe

    return submit_recipe(recipe, overrides=overrides, smoke=smoke, store=store, address=address, is_upload=is_upload)


def sample(model: str, prompts: Sequence[str], **settings: Any) -> list[dict[str, Any]]:
    """Answers of a model (RUN/STAGE, store address or folder) to each prompt; see `launch.cli.sample_text`."""
    from launch.cli.sample_text import sample_texts

    return sample_texts(model, prompts, **settings)


def draw(model: str, output: str | Path, **settings: Any) -> dict[str, Any]:
    """Draw a grid of a model's pictures (RUN/STAGE, store address or folder) into a PNG; see `pictures.draw_grid`."""
    from launch.cli.sample_images import draw_grid

    return draw_grid(model, Path(output), **settings)


def score(model: str, path: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """Rank a path's pictures by a VAE's bound or a classifier's confidence; see `launch.cli.sample_images.score`."""
    from launch.cli.sample_images import score as score_pictures

    return score_pictures(model, os.fspath(path), **settings)
