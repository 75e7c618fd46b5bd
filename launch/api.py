"""The Python calls behind the commands; each raises a `recipes.errors.TrainwrightError` that carries the exit code.

import launch
result = launch.run("recipes/quickstart.yaml", overrides=["stages.policy.algorithm.kl_coef=0.1"])
print(result.stages["eval"].manifest.metrics)
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch.capacity.nodes import nodes_of
from launch.capacity.workers import find_rates, hardware_of, imagined_nodes, settle_workers
from launch.checks.memory import Room, check_memory, misfits
from launch.checks.preflight import CheckResult
from launch.checks.preflight import check as check
from launch.checks.source_counts import source_counts
from launch.inputs.data_check import load_checked
from launch.inputs.resolve import NOT_FOR_PLANS, resolve
from launch.inputs.resolved import Resolved
from launch.records.journal import FINISHED, RunSummary
from launch.records.new_run import new_record, record_of
from launch.records.record import RunRecord, all_runs
from launch.records.stage_result import StageResult
from launch.records.standing import standing
from launch.report.progress import SilentView, View
from launch.runs.execute_run import RunOutcome, execute_run
from launch.runs.resume import resumable
from recipes.errors import RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.planning.cost import UTILISATION
from recipes.planning.gpus import parse_gpus
from recipes.planning.plan import Plan
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
    check_memory(resolved, resolved.plan(store), workers, nodes, only_state=True)
    return resolved


def plan(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    store: str | None = None,
    address: str | None = None,
    on: str | None = None,
    utilisation: float = UTILISATION,
) -> Plan:
    """Stages in order, which of them the store has, what the others take, and which of them do not fit.

    `on`: GPUs that need not be there, as in `8xH100`; `utilisation`: the share of their peak that training reaches.
    """
    opened, gpus = Store.open(store), None if on is None else parse_gpus(on)
    loaded = load_checked(Path(recipe), overrides, smoke, forgives=NOT_FOR_PLANS)
    nodes = nodes_of(address) if gpus is None else imagined_nodes(gpus)
    workers = settle_workers(loaded.recipe, nodes)
    resolved = resolve(loaded, opened, workers, hardware_of(nodes, workers), only_plans=True)
    planned = resolved.plan(
        opened, find_rates(nodes, workers, utilisation, is_here=address is None and gpus is None, gpus=gpus)
    )
    room = Room(nodes, workers.gpus_per_worker > 0)
    counts = tuple(source_counts(loaded, opened))
    return replace(planned, misfits=tuple(misfits(resolved, planned, workers, room)), sources=counts)


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
    return _finish(record, execute_run(record, resolved, address, view))


def _finish(record: RunRecord, outcome: RunOutcome) -> RunResult:
    return RunResult(record.run, record.store.uri, outcome.results, outcome.report)


def run_submitted(run: str, *, store: str | None, address: str | None, view: View) -> RunResult:
    """Drive a run whose folder another machine has written."""
    record = RunRecord.open(Store.open(store), run)
    return _finish(record, execute_run(record, record.resolved(), address, view))


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
        view.say(f"{record.run} is already {summary.state}; there is nothing to resume")
        results = {}
        planned = record.resolved().plan(record.store)
        for stage in planned.stages:
            manifest = record.store.find_artifact(stage.fingerprint)
            if manifest is not None:
                results[stage.name] = StageResult(stage.name, stage.kind, True, manifest, 0.0, 0)
        return RunResult(record.run, record.store.uri, results, summary.report)
    from launch.capacity.job_server import is_job_server
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
    return _finish(record, execute_run(record, resolved, address, view))


def _workers_text(resolved: Resolved) -> str:
    workers = resolved.recipe.cluster.workers
    return f"{workers} worker{'' if workers == 1 else 's'}"


def status(run: str | None = None, *, store: str | None = None) -> list[RunSummary]:
    """The state of runs, oldest first; of one run where it is named."""
    opened = Store.open(store)
    if run is not None:
        return [standing(RunRecord.open(opened, run))]
    return list(map_requests(standing, all_runs(opened), opened.files))


def stop(run: str, *, store: str | None = None, wait: bool = True) -> RunSummary:
    """Ask a run to save its state and end; with `wait` return when it has."""
    record = RunRecord.open(Store.open(store), run)
    summary = standing(record)
    if summary.state in FINISHED or summary.state == "lost":
        raise RequestError(f"{record.run} is not running; it is {summary.state}")
    record.request_stop()
    if summary.state == "submitted" and summary.submission and summary.address:
        from launch.capacity.job_server import stop_job

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
    """Answers of a model (RUN/STAGE, store address or folder) to each prompt; see `launch.sampling.text`."""
    from launch.sampling.text import sample_texts

    return sample_texts(model, prompts, **settings)


def draw(model: str, output: str | Path, **settings: Any) -> dict[str, Any]:
    """Draw a grid of a model's images (RUN/STAGE, store address or folder) into a PNG; see `images.draw_grid`."""
    from launch.sampling.images import draw_grid

    return draw_grid(model, Path(output), **settings)


def score(model: str, path: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """Rank a path's images by a VAE's bound or a classifier's confidence; see `launch.sampling.images.score`."""
    from launch.sampling.images import score as score_images

    return score_images(model, os.fspath(path), **settings)
