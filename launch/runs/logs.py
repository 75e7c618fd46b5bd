"""Workers' output: files in the run's folder where the store is a local one, segments in it elsewhere."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.records.record import RunRecord
from recipes.errors import TrainwrightError
from trainers.store.place import writing
from trainers.store.runs import SegmentWriter
from trainers.store.store import Store

LOGS = "logs"
PREFIX, OWNER = "trainwright-logs-", "owner.json"
"""The driver's temporary folder, and the file in it that names the run; locked while the driver lives."""


class LogShipper:
    """Copies what was added to log files into a run's folder of a store that is not local."""

    def __init__(self, record: RunRecord, folder: Path) -> None:
        self._record = record
        self._folder = folder
        self._sent: dict[str, tuple[int, SegmentWriter]] = {}

    def ship(self) -> None:
        """Send what is new, whole lines only."""
        for path in sorted(self._folder.glob("*.log")):
            offset, writer = self._sent.get(path.name) or (0, self._record.folder.writer(f"{LOGS}/{path.stem}"))
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.decode(errors="replace").splitlines():
                writer.append({"line": line})
            writer.flush()
            self._sent[path.name] = (offset + len(whole), writer)


@contextlib.contextmanager
def log_folder_of(record: RunRecord) -> Iterator[Path]:
    """Where workers' logs go: into the run's folder where that is a local one, else by way of a temporary folder.

    What a killed driver left on this machine, of any run of the same store, is sent to its run and removed first.
    """
    if record.local_folder is not None:
        folder = record.local_folder / LOGS
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    _send_left(record.store)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    shipper = LogShipper(record, folder)
    try:
        with (folder / OWNER).open("x") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            owner.write(json.dumps({"store": record.store.uri, "run": record.run}))
            owner.flush()
            try:
                yield folder
            finally:
                shipper.ship()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _send_left(store: Store) -> None:
    """Send the logs of dead drivers to their runs in this store; logs of other stores stay where they are."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or just removed
            continue
        with open(descriptor) as owner:
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                record = json.load(owner)
            except (OSError, ValueError):  # its driver lives, or died while it wrote this
                continue
            if os.fstat(descriptor).st_uid != os.getuid() or record.get("store") != store.uri:
                continue
            try:
                LogShipper(RunRecord(store, str(record["run"])), path.parent).ship()
            except TrainwrightError:  # a later run tries again
                continue
        shutil.rmtree(path.parent, ignore_errors=True)


def read_logs(run: str, stage: str | None = None, *, store: str | None = None) -> Iterator[tuple[str, str]]:
    """(source, line) of a run's driver and workers; of one stage's workers only, if it is given."""
    record = RunRecord.open(Store.open(store), run)
    if stage is None:
        for event in record.events():
            if event["event"] != "progress":
                yield "driver", note(event)
        yield from _job_lines(record)
    local = record.local_folder
    if local is not None:
        for path in sorted((local / LOGS).glob("*.log"), key=lambda path: path.stat().st_mtime):
            if _belongs(path.stem, stage):
                for line in path.read_text(errors="replace").splitlines():
                    yield path.stem, line
    for source in dict.fromkeys(segment.split("/")[-2] for segment in record.folder.segments(LOGS)):
        if _belongs(source, stage):
            for item in record.folder.read_lines(f"{LOGS}/{source}"):
                yield source, item["line"]


def _job_lines(record: RunRecord) -> Iterator[tuple[str, str]]:
    """What a submitted run's driver printed, where its job server still knows."""
    summary = record.summary()
    if summary.submission and summary.address:
        from launch.capacity.job_server import JobServer

        with contextlib.suppress(TrainwrightError):
            for line in JobServer(summary.address).logs(summary.submission).splitlines():
                yield "job", line


def _belongs(source: str, stage: str | None) -> bool:
    """Labels are STAGE-ATTEMPT, files STAGE-ATTEMPT[-verify]-rank-N."""
    if stage is None:
        return True
    rest = source.removeprefix(f"{stage}-")
    return rest != source and rest.split("-")[0].isdigit()


def note(event: dict[str, Any]) -> str:
    """One event of the journal as a line of text."""
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    fields = {key: value for key, value in event.items() if key not in ("event", "at", "driver") and value is not None}
    if "verdict" in fields:
        fields["verdict"] = fields["verdict"].get("message", "")
    return f"{at} {event['event']} " + " ".join(f"{key}={value}" for key, value in fields.items())
