"""Walking a plan: caching, gates, retries, stopping, and what the journal says of it."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.protocol import Verdict, WorkerFailed
from launch.report.progress import SilentView
from launch.runs.execute_run import execute_run, ray_pool
from recipes.errors import CapacityError, Preempted, StageError
from tests.unit.launch.bench import Bench

LOST = Verdict(kind="signal", message="signal 9 (SIGKILL): rank 0", rank=0, infrastructure=True)
WRONG = Verdict(kind="exception", message="ValueError: no", rank=0, traceback="Traceback: ...", exit_code=4)


def kinds(record: Any) -> list[str]:
    return [event["event"] for event in record.events() if event["event"] not in ("phase", "progress")]


def test_a_run_computes_every_stage_once_and_says_so(bench: Bench) -> None:
    record, driven = bench.drive()
    assert [job["stage"] for job in bench.stages.jobs] == ["base", "chat", "eval"] == bench.stages.verified
    assert [result.cached for result in driven.results.values()] == [False] * 3
    assert kinds(record) == ["run_started", *["stage_started", "stage_committed"] * 3, "run_finished", "report_written"]
    assert record.summary().state == "completed"
    assert {manifest.verification.how for manifest in bench.store.list_artifacts()} == {"clean-process"}


def test_a_job_holds_what_a_stage_needs(bench: Bench) -> None:
    record, driven = bench.drive()
    job = bench.stages.jobs[1]
    base = driven.results["base"].manifest
    assert job["run"] == record.run
    assert job["inputs"]["init_from"] == base.model_dump(mode="json")
    assert job["lease"] == job["attempt"] == 1
    assert job["workers"] == 1
    assert set(job["data"]) == {"data"}
    assert job["recipe"]["cluster"]["workers"] == 1


def test_a_second_run_is_cached_and_asks_for_no_worker(bench: Bench) -> None:
    first, _ = bench.drive()
    pools = bench.pools
    second, driven = bench.drive()
    assert all(result.cached for result in driven.results.values())
    assert bench.pools == pools
    assert len(bench.stages.jobs) == 3
    assert [stage.state for stage in second.summary().stages] == ["cached"] * 3
    assert first.run != second.run


def test_a_changed_stage_runs_again_with_what_depends_on_it(bench: Bench) -> None:
    bench.drive()
    _, driven = bench.drive("stages.chat.train.steps=5")
    assert {name: result.cached for name, result in driven.results.items()} == {
        "base": True,
        "chat": False,
        "eval": False,
    }


def test_a_placement_change_runs_nothing_again(bench: Bench) -> None:
    bench.drive()
    _, driven = bench.drive("stages.base.train.save_every=1", "stages.chat.shard.zero=3")
    assert all(result.cached for result in driven.results.values())


def test_an_infrastructure_failure_is_tried_again_with_the_next_lease(bench: Bench) -> None:
    def fail_once(job: dict[str, Any], worker: Any) -> None:
        if job["stage"] == "chat" and job["attempt"] == 1:
            raise WorkerFailed(LOST)

    bench.stages.hook = fail_once
    record, driven = bench.drive()
    assert driven.results["chat"].attempts == 2
    failed = [event for event in record.events() if event["event"] == "stage_failed"]
    assert [(event["stage"], event["attempt"], event["retry"]) for event in failed] == [("chat", 1, True)]
    assert record.summary().state == "completed"


def test_a_users_error_is_not_tried_again(bench: Bench) -> None:
    def fail(job: dict[str, Any], worker: Any) -> None:
        raise WorkerFailed(WRONG)

    bench.stages.hook = fail
    record = bench.record(bench.resolve())
    with pytest.raises(WorkerFailed):
        bench.drive(record=record)
    assert len(bench.stages.jobs) == 1
    summary = record.summary()
    assert (summary.state, summary.exit_code, summary.stages[0].error) == ("failed", 4, "ValueError: no")


def test_a_stop_that_the_workers_do_not_live_to_answer_is_no_failure(bench: Bench) -> None:
    def end_with_the_group(job: dict[str, Any], worker: Any) -> None:
        if job["stage"] == "base" and job["attempt"] == 1:
            raise WorkerFailed(Verdict(kind="stopped", message="ended with the group: rank 0", infrastructure=True))

    bench.stages.hook = end_with_the_group
    record = bench.record(bench.resolve())
    with pytest.raises(Preempted, match=f"before the workers .*trainwright resume {record.run}"):
        bench.drive(record=record)
    assert (record.summary().state, record.summary().exit_code) == ("stopped", 75)
    bench.drive(record=record)
    assert record.summary().state == "completed"


def test_a_stopped_run_is_resumed_where_it_was(bench: Bench) -> None:
    def stop(job: dict[str, Any], worker: Any) -> None:
        if job["stage"] == "chat" and job["attempt"] == 1:
            raise Preempted("state saved")

    bench.stages.hook = stop
    record = bench.record(bench.resolve())
    with pytest.raises(Preempted, match=f"trainwright resume {record.run}"):
        bench.drive(record=record)
    assert record.summary().state == "stopped"
    bench.drive(record=record)
    assert [job["stage"] for job in bench.stages.jobs] == ["base", "chat", "chat", "eval"]
    summary = record.summary()
    assert summary.state == "completed"
    assert [stage.attempts for stage in summary.stages] == [1, 2, 1]
    assert [stage.state for stage in summary.stages] == ["committed"] * 3


def test_an_interrupted_run_says_how_to_go_on(bench: Bench) -> None:
    def interrupt(job: dict[str, Any], worker: Any) -> None:
        raise KeyboardInterrupt

    bench.stages.hook = interrupt
    record = bench.record(bench.resolve())
    with pytest.raises(KeyboardInterrupt):
        bench.drive(record=record)
    summary = record.summary()
    assert (summary.state, summary.exit_code) == ("interrupted", 130)
    assert "resume" in (summary.message or "")


def test_a_failed_gate_refuses_the_next_stage(bench: Bench) -> None:
    bench.stages.hook = lambda job, worker: {"gate": {"passed": False, "reasons": ["loss 9 > 5"]}}
    record = bench.record(bench.resolve())
    with pytest.raises(StageError, match=r"stages\.chat\.init_from: base .* loss 9 > 5"):
        bench.drive(record=record)
    assert [job["stage"] for job in bench.stages.jobs] == ["base"]
    assert record.summary().exit_code == 4


def test_files_that_fail_their_verification_are_withheld_and_a_resume_writes_them_again(bench: Bench) -> None:
    bench.stages.refused = {"base"}
    with pytest.raises(StageError, match=r"VerificationError.*`trainwright resume"):
        bench.drive()
    assert bench.store.list_artifacts() == []
    bench.stages.refused = set()
    bench.drive()
    assert {manifest.stage for manifest in bench.store.list_artifacts()} == {"base", "chat", "eval"}


def test_files_that_fail_their_verification_are_committed_with_a_failed_gate_where_asked(bench: Bench) -> None:
    bench.stages.refused = {"base"}
    with pytest.raises(StageError, match=r"stages\.chat\.init_from: base .*gate: verification: VerificationError"):
        bench.drive("stages.base.verification=ignore")
    (base,) = bench.store.list_artifacts()
    assert base.verification.how == "failed"
    assert not base.gate.passed


def test_an_ignored_gate_lets_the_chain_go_on_and_the_last_gate_counts(bench: Bench) -> None:
    failed = {"gate": {"passed": False, "reasons": ["too bad"]}}
    bench.stages.hook = lambda job, worker: failed if job["stage"] == "base" else None
    record, _ = bench.drive("stages.chat.gate=ignore", "stages.eval.gate=ignore")
    assert record.summary().state == "completed"
    bench.stages.hook = lambda job, worker: failed if job["stage"] == "eval" else None
    with pytest.raises(StageError, match=r"eval .*: too bad"):
        bench.drive("seed=5")


def test_a_candidate_that_names_other_parents_is_never_committed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage = bench.stages.run_stage

    def forge(job: dict[str, Any], worker: Any) -> dict[str, Any]:
        made: dict[str, Any] = run_stage(job, worker)
        for parent in made["candidate"]["parents"].values():
            parent["digest"] = "f" * 64
        return made

    monkeypatch.setattr(bench.stages, "run_stage", forge)
    with pytest.raises(AssertionError, match=r"^chat: .* parents"):
        bench.drive()
    assert [manifest.stage for manifest in bench.store.list_artifacts()] == ["base"]


def test_a_stop_request_in_the_store_reaches_the_workers(bench: Bench) -> None:
    def wait(job: dict[str, Any], worker: Any) -> None:
        if job["stage"] == "base":
            record.request_stop()
            deadline = time.monotonic() + 10
            while not worker.stop_requested():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            raise Preempted("state saved")

    bench.stages.hook = wait
    record = bench.record(bench.resolve())
    with pytest.raises(Preempted):
        bench.drive(record=record)
    assert record.summary().state == "stopped"


class BusySession:
    """A cluster whose resources others hold: every group waits for them until the session is cancelled."""

    DEADLINE_S = 10.0

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.is_shut_down = False

    def cancel(self) -> None:
        self.cancelled.set()

    def group(self, spec: Any, on_wait: Callable[[str], None]) -> Any:
        on_wait("waiting for resources: held by 'other'")
        if self.cancelled.wait(self.DEADLINE_S):
            raise Preempted("stopped while it waited for resources")
        raise CapacityError("gave up")

    def shutdown(self) -> None:
        self.is_shut_down = True


def test_a_stop_ends_the_wait_for_busy_resources(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    session = BusySession()
    monkeypatch.setattr("launch.runs.execute_run.start", lambda *arguments, **settings: session)
    monkeypatch.setattr("cluster.ray_group.RayGroup", lambda session, spec, on_wait: session.group(spec, on_wait))
    record = bench.record(bench.resolve())
    view = SilentView()
    monkeypatch.setattr(view, "say", lambda text: record.request_stop() if text.startswith("waiting") else None)
    with pytest.raises(Preempted, match=f"waited for resources; .*trainwright resume {record.run}"):
        execute_run(record, record.resolved(), "10.0.0.1:6379", view, ray_pool)
    assert session.is_shut_down
    assert record.summary().state == "stopped"


def test_curves_of_a_cached_stage_come_from_the_run_that_computed_it(bench: Bench) -> None:
    from launch.report.collect import collect

    bench.drive()
    record, _ = bench.drive()
    found = collect(record)
    assert [stage.curves for stage in found.stages] == [{"loss": [(1.0, 2.0), (2.0, 1.0)]}] * 3
    assert (record.local_folder / "report.html").read_text().count("<svg") >= 4


def test_a_store_that_is_no_folder_keeps_logs_and_report_too(bench: Bench) -> None:
    from launch.records.record import RunRecord
    from launch.runs.logs import read_logs
    from trainers.store.store import Store

    bench.store = Store.open("memory://launch-test")

    def log_a_line(job: dict[str, Any], worker: Any) -> None:
        (bench.log_folder / f"{job['stage']}-1-rank-0.log").write_text("a line of the worker\n")

    bench.stages.hook = log_a_line
    record, driven = bench.drive()
    assert record.summary().state == "completed"
    assert driven.report == f"memory://launch-test/runs/{record.run}/report.html"
    assert record.folder.read("report.html").startswith(b"<!doctype html>")
    assert record.write_report("again").endswith("/report-2.html")
    assert ("chat-1-rank-0", "a line of the worker") in set(read_logs(record.run, "chat", store=bench.store.uri))
    assert RunRecord.open(bench.store, record.run[:6]).run == record.run
