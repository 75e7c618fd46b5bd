"""The journal of a run: one JSON line per event, and the summary that `status` makes of them.

Events: run_submitted, run_started, stage_started, phase, progress, note, waiting, stage_committed, stage_failed,
run_finished, report_written. Every line carries `event` and `at` (seconds since the epoch); `progress` lines double as
the driver's heartbeat and say, as `next_s`, when the next one is due at the latest.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

FINISHED = ("completed", "failed", "stopped", "interrupted")
RESUMABLE = ("failed", "stopped", "interrupted", "lost")

Event = dict[str, Any]


LAST_INTERVAL_S = 60.0
INTERVAL_SHARE = 0.02
"""Of the time that has passed: so the files that are written grow with its logarithm, later with its minutes."""


def interval_s(first_s: float, elapsed_s: float) -> float:
    """Seconds to let pass between two files of what is written again and again; ever longer, at most a minute."""
    return min(LAST_INTERVAL_S, max(first_s, INTERVAL_SHARE * elapsed_s))


class Writer(Protocol):
    """Where lines go: a segment writer of the run's directory."""

    def append(self, record: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def this_machine() -> str:
    """Names the running kernel and process namespace: a pid means something only within it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def this_driver() -> dict[str, Any]:
    """Who writes: enough to tell later, from the same machine, whether this process still runs."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": this_machine(), "pid": pid, "start_ticks": start_ticks(pid)}


def is_alive(driver: dict[str, Any], last_at: float, next_s: float, now: float | None = None) -> bool:
    """Whether a run's driver still runs: by its pid on this machine, else by the age of its last heartbeat."""
    if driver.get("machine") == this_machine():
        return start_ticks(int(driver["pid"])) == driver.get("start_ticks")
    return (time.time() if now is None else now) - last_at < 3 * next_s + 10


class Journal:
    """Appends events; every event is durable when `write` returns."""

    def __init__(self, writer: Writer, driver: str = "", clock: Callable[[], float] = time.time) -> None:
        """`driver` names its writer among those of the run."""
        self.driver = driver
        self._writer = writer
        self._clock = clock
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> Event:
        """Append one event."""
        record: Event = {"event": event, "at": round(self._clock(), 3), **fields}
        with self._lock:
            self._writer.append(record)
            self._writer.flush()
        return record


@dataclass
class StageSummary:
    """One stage as `status` shows it; state is waiting, running, committed, cached or failed."""

    name: str
    kind: str
    state: str = "waiting"
    fingerprint: str | None = None
    digest: str | None = None
    attempts: int = 0
    phase: str | None = None
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    gate: dict[str, Any] | None = None
    error: str | None = None


@dataclass
class RunSummary:
    """One run as `status` shows it; state is submitted, running, completed, failed, stopped, interrupted or lost."""

    run: str
    recipe: str
    state: str
    stages: list[StageSummary]
    started_at: float | None = None
    updated_at: float | None = None
    message: str | None = None
    waiting: str | None = None
    """What it waits for: resources, or a node that does not answer."""
    exit_code: int | None = None
    report: str | None = None
    address: str | None = None
    submission: str | None = None
    driver: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The stable `--json` form."""
        return asdict(self)


def _apply(summary: RunSummary, stages: dict[str, StageSummary], event: Event) -> None:
    """Fold one event into the summary."""
    stage = stages.get(event.get("stage", ""))
    match event["event"]:
        case "run_submitted":
            summary.state = "submitted"
            summary.address, summary.submission = event.get("address"), event.get("submission")
        case "run_started":
            summary.state, summary.driver = "running", event.get("driver", {})
            summary.started_at = summary.started_at or event["at"]
            if summary.submission is None:
                summary.address = event.get("address")
            summary.message = summary.waiting = summary.exit_code = summary.report = None
            for entry in stages.values():
                if entry.state in ("running", "failed"):
                    entry.state, entry.error = "waiting", None
        case "stage_started" if stage:
            stage.state, stage.attempts = "running", stage.attempts + 1
            stage.fingerprint, stage.error = event.get("fingerprint"), None
        case "phase" | "progress" if stage:
            stage.phase = event.get("phase") or stage.phase
            stage.step = event["step"] if event.get("step") is not None else stage.step
            stage.steps = event["steps"] if event.get("steps") is not None else stage.steps
        case "waiting":
            summary.waiting = event["text"] or None
        case "stage_committed" if stage and event.get("cached") and stage.state == "committed":
            pass  # a resume that finds what this very run has made
        case "stage_committed" if stage:
            stage.state = "cached" if event.get("cached") else "committed"
            stage.fingerprint, stage.digest = event.get("fingerprint"), event.get("digest")
            stage.seconds, stage.gate, stage.phase = event.get("seconds"), event.get("gate"), None
        case "stage_failed" if stage:
            summary.waiting = None
            stage.state, stage.error = "failed", (event.get("verdict") or {}).get("message")
        case "report_written":
            summary.report = event["path"]
        case "run_finished":
            summary.state, summary.message, summary.waiting = event["state"], event.get("message"), None
            summary.exit_code = event.get("exit_code")
            for entry in stages.values():
                if entry.state == "running":
                    entry.state = "waiting"


def summarise(
    run: str,
    recipe: str,
    stages: Iterable[tuple[str, str]],
    events: Iterable[Event],
    alive: Callable[[dict[str, Any], float, float], bool] = is_alive,
) -> RunSummary:
    """Fold a run's events, in any order, into its summary; `stages` are (name, kind) in the plan's order."""
    by_name = {name: StageSummary(name, kind) for name, kind in stages}
    summary = RunSummary(run=run, recipe=recipe, state="submitted", stages=list(by_name.values()))
    next_s = 30.0
    for event in sorted(events, key=lambda entry: float(entry["at"])):
        _apply(summary, by_name, event)
        summary.updated_at = event["at"]
        next_s = event.get("next_s", next_s)
    if summary.state == "running" and not alive(summary.driver, summary.updated_at or 0.0, next_s):
        summary.state = "lost"
        summary.message = f"the driver on {summary.driver.get('host', 'its host')} is gone; resume continues the run"
    return summary
