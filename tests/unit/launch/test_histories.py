"""What a driver writes last says what the journal says, and only as long as nothing came later."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from launch.records import record as records
from launch.records.histories import find_end, read_history
from launch.records.journal import this_driver
from launch.records.record import RunRecord
from recipes.errors import Preempted, StageError
from tests.unit.launch.bench import Bench


def end_of(record: RunRecord) -> str:
    """The name of the only end in a run's folder."""
    (name,) = (name for name in record.folder.names("journal") if name.endswith(".json"))
    return f"journal/{name}"


def rewrite(record: RunRecord, **changes: Any) -> None:
    path = record.local_folder / end_of(record)  # type: ignore[operator]
    content = {**json.loads(path.read_text()), **changes}
    path.chmod(0o644)
    path.write_text(json.dumps(content))


def by_journal(record: RunRecord) -> dict[str, Any]:
    return asdict(read_history(record.folder, record.run, record.raw))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is not to be read."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the journal was read")

    monkeypatch.setattr(records, "read_history", refuse)


def test_an_ended_run_is_known_without_its_journal(bench: Bench, unread: None) -> None:
    record, driven = bench.drive()
    history = record.history()
    assert asdict(history.summary) == by_journal(record)["summary"]
    assert history.summary.state == "completed"
    assert history.summary.report == driven.report
    assert history.committed == {result.manifest.fingerprint: True for result in driven.results.values()}
    second, _ = bench.drive()
    assert [stage.state for stage in second.summary().stages] == ["cached"] * 3
    assert set(second.history().committed.values()) == {False}


def test_a_run_is_the_origin_of_what_it_computed_without_its_journal(bench: Bench, unread: None) -> None:
    first, driven = bench.drive()
    second, _ = bench.drive("stages.eval.gate=ignore")
    fingerprint = driven.results["chat"].manifest.fingerprint
    assert records.origin_of(bench.store, fingerprint, second.run).run == first.run
    assert records.origin_of(bench.store, fingerprint, first.run) is None
    assert records.origin_of(bench.store, "0" * 64, first.run) is None


def test_a_failed_run_is_known_too(bench: Bench, unread: None) -> None:
    bench.stages.hook = lambda job, worker: (_ for _ in ()).throw(StageError("no"))
    failed = bench.record(bench.resolve())
    with pytest.raises(Exception, match="no"):
        bench.drive(record=failed)
    assert failed.summary().state == "failed"
    assert asdict(failed.history().summary) == by_journal(failed)["summary"]


def test_a_resumed_run_is_known_by_its_last_driver(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench.record(bench.resolve())

    def stop(job: dict[str, Any], worker: Any) -> None:
        if job["stage"] == "chat":
            raise Preempted("stopped")

    bench.stages.hook = stop
    with pytest.raises(Preempted):
        bench.drive(record=record)
    assert record.summary().state == "stopped"
    first_end = end_of(record)
    bench.stages.hook = lambda job, worker: None
    bench.drive(record=record)
    assert find_end(record.folder) is not None
    assert asdict(record.history().summary) == by_journal(record)["summary"]
    assert record.summary().state == "completed"
    assert json.loads(record.folder.read(first_end))["summary"]["state"] == "stopped"


def test_an_event_after_the_end_makes_it_stale(bench: Bench) -> None:
    record, _ = bench.drive()
    assert find_end(record.folder) is not None
    (driver,) = (name for name in record.folder.names("journal") if not name.endswith(".json"))
    late = record.folder.writer(f"journal/{driver}")
    late.append({"event": "run_started", "at": 9e9, "driver": this_driver()})
    late.flush()
    assert find_end(record.folder) is None
    assert record.summary().state == "running"


def test_a_driver_after_the_end_makes_it_stale(bench: Bench) -> None:
    record, _ = bench.drive()
    record.journal().write("run_started", driver=this_driver(), next_s=5)
    assert find_end(record.folder) is None
    assert record.summary().state == "running"


def test_an_older_driver_that_still_writes_makes_the_end_stale(bench: Bench) -> None:
    record = bench.record(bench.resolve())
    older = record.journal()
    older.write("run_started", driver=this_driver(), next_s=5)
    bench.drive(record=record)
    assert find_end(record.folder) is not None
    older.write("progress", next_s=5)
    assert find_end(record.folder) is None


def test_a_driver_that_ends_while_another_drives_writes_no_end(bench: Bench) -> None:
    record = bench.record(bench.resolve())
    ours, theirs = record.journal(), record.journal()
    ours.write("run_started", driver=this_driver(), next_s=5)
    ours.write("run_finished", state="failed", exit_code=1)
    theirs.write("run_started", driver=this_driver(), next_s=5)
    record.write_end(ours)
    assert not [name for name in record.folder.names("journal") if name.endswith(".json")]
    assert record.summary().state == "running"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"ends": {}},
        {"ends": {"20200101-000000-00000000": 3}},
        {"ends": None},
        {"summary": {"state": "completed"}},
        {"committed": ["a"]},
    ],
    ids=str,
)
def test_an_end_that_is_damaged_or_of_a_later_version_is_not_used(bench: Bench, changes: dict[str, Any]) -> None:
    record, _ = bench.drive()
    rewrite(record, **changes)
    assert find_end(record.folder) is None
    assert record.summary().state == "completed"


def test_an_end_never_says_that_a_run_is_running(bench: Bench) -> None:
    record, _ = bench.drive()
    summary = {**asdict(record.summary()), "state": "running"}
    rewrite(record, summary=summary)
    assert find_end(record.folder) is None


def test_an_end_that_cannot_be_written_fails_no_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(records, "write_end", refuse)
    record, _ = bench.drive()
    assert record.summary().state == "completed"


def test_an_end_that_is_cut_off_is_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    record, _ = bench.drive()
    path = record.local_folder / end_of(record)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-9])
    assert record.summary().state == "completed"
    assert f"{record.store.uri}/runs/{record.run}: {end_of(record)}" in caplog.text
