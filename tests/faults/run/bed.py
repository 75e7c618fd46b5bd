"""Runs in processes of their own that are killed from outside, and what is left of them afterwards."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.records.record import RunRecord
from trainers.store.store import Store

CHAIN = Path(__file__).with_name("chain.yaml")
PROJECT = Path(__file__).resolve().parents[3]
CLEAN_S = 10.0
FINISH_S = 1500.0
BEFORE_WORK = ("start", "join", "joined")
CACHES = ("torchinductor_",)
"""Folders that torch makes once per machine and user, for compiled code."""


@dataclass
class Hit:
    """A kill: who was killed, and what the run was doing."""

    victim: str
    stage: str
    phase: str
    step: int | None
    after_s: float

    def __str__(self) -> str:
        step = "" if self.step is None else f" step {self.step}"
        return f"{self.victim} killed in {self.stage}, phase {self.phase}{step}, {self.after_s:.2f} s into it"


@dataclass
class Bed:
    """A separate store, a separate folder for temporary files, and the processes started on them."""

    store: Path
    temporary: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    shared_before: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))

    @property
    def mark(self) -> bytes:
        """Stands in the environment of every process that a run starts."""
        return f"TRAINWRIGHT_FAULTS={self.temporary.name}".encode()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of trainwright; its output goes to a file."""
        name, _, value = self.mark.decode().partition("=")
        environment = {**os.environ, name: value, "TMPDIR": str(self.temporary), "TRAINWRIGHT_STORE": str(self.store)}
        environment["PYTHONPATH"] = str(PROJECT)
        with (self.store.parent / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *arguments],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def finish(self, *arguments: str) -> None:
        """Run a command of trainwright to its successful end."""
        code = self.start(*arguments).wait(FINISH_S)
        assert code == 0, f"trainwright {' '.join(arguments)}: exit {code}\n{self.output()}"

    def output(self) -> str:
        """What was printed so far."""
        return (self.store.parent / "output.txt").read_text()

    def record(self) -> RunRecord | None:
        """The only run of the store, once it is there."""
        store = Store.open(str(self.store))
        runs = [run for run in store.runs() if store.run(run).find("recipe.json") is not None]
        return RunRecord.open(store, runs[0]) if runs else None

    def digests(self) -> dict[str, str]:
        """Digest of every artifact by its stage."""
        return {made.stage: made.digest for made in Store.open(str(self.store)).list_artifacts()}

    def wait_for(self, found: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
        """Poll until something is there; the process must not end before."""
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline:
            result = found()
            if result:
                return result
            assert process.poll() is None, f"the driver ended too early\n{self.output()}"
            time.sleep(0.05)
        raise AssertionError(f"nothing happened in {FINISH_S:.0f} s\n{self.output()}")

    def events(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The journal, or a stage's part of it."""
        record = self.record()
        if record is None:
            return []
        return [event for event in record.events() if stage is None or event.get("stage") == stage]

    def started(self, stage: str, times: int) -> bool:
        """Whether a stage was started that often."""
        return sum(event["event"] == "stage_started" for event in self.events(stage)) >= times

    def workers(self, stage: str) -> dict[int, int]:
        """Process ids by rank: a rank's output goes to the stage's log file."""
        pattern = re.compile(rf"/logs/{re.escape(stage)}-\d+-rank-(\d+)\.log$")
        found = {}
        for pid in self.marked():
            try:
                match = pattern.search(os.readlink(f"/proc/{pid}/fd/1"))
            except OSError:
                continue
            if match:
                found[int(match.group(1))] = pid
        return found

    def marked(self) -> list[int]:
        """Every living process that a run on this bed started, by its environment or its open files."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                belongs = self.mark in Path(f"/proc/{name}/environ").read_bytes() or any(
                    os.readlink(handle).startswith(f"{self.temporary}/")
                    for handle in Path(f"/proc/{name}/fd").iterdir()
                )
            except OSError:
                continue
            if belongs:
                found.append(int(name))
        return found

    def left(self) -> dict[str, Any]:
        """What of a run still exists that should not, by sort; empty lists when all is gone."""
        processes = []
        for pid in self.marked():
            try:
                processes.append(f"{pid} " + Path(f"/proc/{pid}/cmdline").read_bytes()[:90].decode(errors="replace"))
            except OSError:
                continue
        shared = set(os.listdir("/dev/shm")) - self.shared_before
        return {
            "processes": processes,
            "temporary files": sorted(name for name in os.listdir(self.temporary) if not name.startswith(CACHES)),
            "shared memory": sorted(shared - mapped_by_others(self.mark)) if shared else [],
        }

    def assert_nothing_left(self) -> float:
        """Wait until all is gone; returns the seconds that it took."""
        started = time.monotonic()
        while any(left := self.left().values()):
            assert time.monotonic() - started < CLEAN_S, f"left after {CLEAN_S:.0f} s: {self.left()}"
            time.sleep(0.1)
        del left
        return time.monotonic() - started

    def works(self, stage: str) -> bool:
        """Whether the ranks of a stage have joined and gone on."""
        return any(event["event"] == "phase" and event["phase"] not in BEFORE_WORK for event in self.events(stage))

    def kill(
        self, driver: subprocess.Popen[bytes], stage: str, victim: str, from_work: bool, after_s: float, rank: int
    ) -> Hit | None:
        """Wait for the stage's start (or its work's) and the moment, then kill; None when it was committed before."""
        self.wait_for(lambda: self.started(stage, 1), driver)
        if from_work:
            self.wait_for(lambda: self.works(stage) or self.committed(stage), driver)
        begun = time.monotonic()
        pids: dict[int, int] = {}
        if victim == "worker":
            pids = self.wait_for(lambda: self.workers(stage) or self.committed(stage), driver)
            if pids is True:
                return None
        while time.monotonic() - begun < after_s:
            if self.committed(stage):
                return None
            time.sleep(0.05)
        if victim == "worker":
            pids = self.workers(stage)
        pid = driver.pid if victim == "driver" else pids.get(rank) or next(iter(pids.values()), None)
        if pid is None or self.committed(stage):
            return None
        os.kill(pid, signal.SIGKILL)
        if victim == "driver":
            driver.wait(10)
        told = [event for event in self.events(stage) if event["event"] in ("phase", "progress", "stage_started")]
        phase = next((event["phase"] for event in reversed(told) if event.get("phase")), "start")
        step = next((event["step"] for event in reversed(told) if event.get("step") is not None), None)
        return Hit(f"rank {rank}" if victim == "worker" else victim, stage, phase, step, after_s)

    def committed(self, stage: str) -> bool:
        """Whether the journal says that the stage is done."""
        return any(event["event"] == "stage_committed" for event in self.events(stage))

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)
        for pid in self.marked():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        shutil.rmtree(self.temporary, ignore_errors=True)


def mapped_by_others(mark: bytes) -> set[str]:
    """Names in /dev/shm that living processes without this mark have mapped: of what else runs on the machine.

    A semaphore is mapped under a name that it was given before its own, so files are compared by inode.
    """
    inodes: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (process / "environ").read_bytes():
                inodes.update(int(i) for i in re.findall(r" (\d+) +/dev/shm/", (process / "maps").read_text()))
        except OSError:
            continue
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in inodes}


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run makes, and how long each stage takes."""

    digests: dict[str, str]
    seconds: dict[str, float]
    """From a stage's start to its commit."""
    work_seconds: dict[str, float]
    """From the first phase after all ranks have joined to the commit."""
