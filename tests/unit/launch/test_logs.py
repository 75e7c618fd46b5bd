"""Logs of workers on their way to a store that is not a local folder."""

import fcntl
import json
import secrets
import tempfile
from pathlib import Path

import pytest

from launch.records.record import RunRecord
from launch.runs.logs import OWNER, PREFIX, log_folder_of, read_logs
from trainers.store.store import Store


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Store.open(f"memory://{secrets.token_hex(8)}/store")
    return RunRecord(store, store.new_run("recipe").id)


def lines(record: RunRecord) -> list[str]:
    return [line for _, line in read_logs(record.run, "base", store=record.store.uri)]


def leave(folder: Path, name: str, record: RunRecord, store: str) -> Path:
    """What a killed driver leaves."""
    left = folder / f"{PREFIX}{name}"
    left.mkdir()
    (left / OWNER).write_text(json.dumps({"store": store, "run": record.run}))
    (left / "base-1-rank-0.log").write_text(f"from {name}\n")
    return left


def test_a_drivers_folder_is_sent_and_removed(record: RunRecord, tmp_path: Path) -> None:
    with log_folder_of(record) as folder:
        (folder / "base-1-rank-0.log").write_text("one\ntwo\n")
    assert lines(record) == ["one", "two"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_driver_left_is_sent_by_the_next(record: RunRecord, tmp_path: Path) -> None:
    leave(tmp_path, "gone", record, record.store.uri)
    other = leave(tmp_path, "other", record, "s3://elsewhere/store")
    alive = leave(tmp_path, "alive", record, record.store.uri)
    worker = tmp_path / f"{PREFIX}worker"
    worker.mkdir()
    with (alive / OWNER).open() as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        with log_folder_of(record):
            pass
    assert lines(record) == ["from gone"]
    assert sorted(tmp_path.iterdir()) == sorted([other, alive, worker])
