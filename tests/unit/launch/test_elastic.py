"""Fewer workers after a loss, and more again: sizes, the wait for room, and a stage that goes through all of it."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.protocol import Verdict, WorkerFailed, WorkerSpec
from launch.capacity.workers import Workers
from launch.inputs.resolve import resolve
from launch.inputs.resolved import Resolved
from launch.report.progress import SilentView
from launch.runs import elastic
from launch.runs.elastic import Sized, sizes_of, wait_for_size
from launch.runs.execute_run import PoolRequest, execute_run
from launch.runs.worker_pool import StageWorkers
from recipes.errors import CapacityError, Preempted
from recipes.loading.load import load_recipe, parse_recipe
from recipes.planning.settle import Hardware
from tests.unit.launch.bench import Bench, FrankGroup

ELASTIC = ("cluster.workers=4", "cluster.min_workers=1", "cluster.replacement_wait_s=0", "cluster.gpus_per_worker=0")


def resolved_for_four(bench: Bench, *overrides: str) -> Resolved:
    """The toy recipe on four workers."""
    return resolve(load_recipe(bench.recipe, [*ELASTIC, *overrides]), bench.store, Workers(4, 0), Hardware())


def test_sizes_share_the_batch_evenly_and_change_neither_fingerprint_nor_samples(bench: Bench) -> None:
    """A micro-batch that no longer divides a share becomes one that does, and is no larger."""
    resolved = resolved_for_four(
        bench, "stages.base.train.global_batch=12", "stages.base.shard.micro_batch=3", "stages.base.shard.engine=plain"
    )
    planned = resolved.plan(None).stages[0]
    assert sizes_of(resolved.recipe.stages["base"], 1, 4) == [4, 3, 2, 1]
    assert sizes_of(resolved.recipe.stages["base"], 2, 4) == [4, 3, 2]
    assert sizes_of(resolved.recipe.stages["chat"], 1, 4) == [4, 2, 1]
    micro = {}
    for workers in (4, 3, 2, 1):
        smaller = Sized.of(resolved, planned, workers)
        given = parse_recipe(smaller.resolved.recipe_json)
        assert (given.cluster.workers, smaller.planned.workers) == (workers, workers)
        micro[workers] = given.stages["base"].shard.micro_batch
        if workers != 3:  # which the batch of another stage cannot be divided among
            assert smaller.resolved.plan(None).stages[0].fingerprint == planned.fingerprint
    assert micro == {4: 3, 3: 1, 2: 3, 1: 3}


@pytest.mark.parametrize(
    ("rooms", "wait_s", "size", "waited_s"),
    [
        ([4], 60, 4, 0),
        ([1, 1, 3, 4], 60, 4, 3),
        ([3], 60, 2, 60),
        ([0, 2], 0, 2, 3),
    ],
)
def test_the_wait_ends_with_room_for_all_or_at_its_end(
    rooms: list[int], wait_s: float, size: int, waited_s: int
) -> None:
    """What a lost group held becomes free after a moment, whatever the wait."""
    now = [0.0]
    left = iter(rooms)
    last = [0]

    def room() -> int:
        last[0] = next(left, last[0])
        return last[0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    told: list[str] = []
    assert wait_for_size([4, 2, 1], room, wait_s, sleep, told.append, lambda: now[0]) == size
    assert now[0] == waited_s
    assert told[-1:] in ([], [""])


def test_too_little_room_is_named() -> None:
    now = iter(range(1000))
    with pytest.raises(CapacityError, match=r"cluster\.min_workers"):
        wait_for_size([4, 2], lambda: 1, 10, lambda seconds: None, lambda text: None, lambda: float(next(now)))


@pytest.fixture
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is told by the rooms alone."""
    monkeypatch.setattr(elastic, "SETTLE_S", 0.0)
    monkeypatch.setattr(elastic, "GROW_EVERY_S", 0.0)


@pytest.mark.usefixtures("without_waits")
def test_a_stage_shrinks_after_a_loss_and_grows_when_there_is_room(bench: Bench) -> None:
    """Four workers, two after a loss, four again: the ranks are asked to leave, and the next attempt has all."""
    free = [0]

    def hook(job: dict[str, Any], worker: Any) -> None:
        if len(bench.stages.jobs) == 1:
            free[0] = 2
            raise WorkerFailed(Verdict(kind="lost", message="lost node", infrastructure=True))
        if len(bench.stages.jobs) == 2:
            free[0] = 4
            with worker.answers_stops():
                worker.beat("train", step=1)
                worker.beat("train", step=1)
                if worker.stop_requested():
                    raise Preempted("saved")

    bench.stages.hook = hook

    def pool(request: PoolRequest) -> StageWorkers:
        def make(spec: WorkerSpec) -> FrankGroup:
            return FrankGroup(replace(spec, num_workers=1, beat_interval_s=0.0))

        return StageWorkers(
            make,
            bench.stages.run_stage,
            bench.stages.verify_candidate,
            request.log_folder,
            free_room=lambda: free[0],
        )

    resolved = resolved_for_four(bench)
    record = bench.record(resolved)
    free[0] = 4
    outcome = execute_run(record, resolved, None, SilentView(), pool)
    assert outcome.failed is None
    assert [job["workers"] for job in bench.stages.jobs[:3]] == [4, 2, 4]
    assert [job["recipe"]["cluster"]["workers"] for job in bench.stages.jobs[:3]] == [4, 2, 4]
    assert [entry["workers"] for entry in record.events() if entry["event"] == "stage_started"][:3] == [4, 2, 4]
    assert outcome.results["base"].manifest.fingerprint == bench.stages.jobs[0]["fingerprint"]
