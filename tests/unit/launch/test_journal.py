"""Folding events into what `status` says."""

from typing import Any

from launch.records.journal import Event, Journal, is_alive, summarise, this_driver

STAGES = [("base", "pretrain"), ("chat", "finetune")]


class Lines:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.flushed = 0

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def flush(self) -> None:
        self.flushed = len(self.records)


def events(*items: tuple[str, dict[str, Any]]) -> list[Event]:
    return [{"event": name, "at": float(at), **fields} for at, (name, fields) in enumerate(items)]


STARTED = ("run_started", {"driver": {"host": "h"}})


def states(items: list[Event], alive: bool = True) -> tuple[str, list[str]]:
    summary = summarise("r", "n", STAGES, items, lambda *_: alive)
    return summary.state, [stage.state for stage in summary.stages]


def test_every_event_is_flushed_when_write_returns() -> None:
    lines = Lines()
    record = Journal(lines, clock=lambda: 12.34567).write("phase", stage="base", phase="train")
    assert lines.flushed == 1
    assert lines.records == [record] == [{"event": "phase", "at": 12.346, "stage": "base", "phase": "train"}]


def test_a_finished_run() -> None:
    items = events(
        STARTED,
        ("stage_committed", {"stage": "base", "cached": True, "fingerprint": "f", "digest": "d"}),
        ("stage_started", {"stage": "chat", "attempt": 1}),
        ("stage_committed", {"stage": "chat", "cached": False}),
        ("run_finished", {"state": "completed", "exit_code": 0, "report": "x"}),
    )
    assert states(items, alive=False) == ("completed", ["cached", "committed"])


def test_a_run_whose_driver_died_is_lost_and_a_resumed_one_runs_again() -> None:
    items = events(STARTED, ("stage_started", {"stage": "base", "attempt": 1}))
    assert states(items) == ("running", ["running", "waiting"])
    assert states(items, alive=False) == ("lost", ["running", "waiting"])
    items += [{**event, "at": event["at"] + 10} for event in events(STARTED, ("stage_started", {"stage": "base"}))]
    summary = summarise("r", "n", STAGES, items, lambda *_: True)
    assert (summary.state, summary.stages[0].attempts) == ("running", 2)


def test_a_failure_keeps_its_verdict_until_the_next_attempt() -> None:
    items = events(
        STARTED,
        ("stage_started", {"stage": "base"}),
        ("stage_failed", {"stage": "base", "verdict": {"kind": "exception", "message": "boom"}}),
        ("run_finished", {"state": "failed", "message": "boom", "exit_code": 4}),
    )
    summary = summarise("r", "n", STAGES, items)
    assert (summary.state, summary.stages[0].error, summary.exit_code) == ("failed", "boom", 4)


def test_progress_is_shown() -> None:
    items = events(
        STARTED, ("stage_started", {"stage": "base"}), ("progress", {"stage": "base", "phase": "train", "step": 3})
    )
    stage = summarise("r", "n", STAGES, items, lambda *_: True).stages[0]
    assert (stage.phase, stage.step) == ("train", 3)


def test_this_process_is_alive_and_a_reused_pid_is_not() -> None:
    driver = this_driver()
    assert is_alive(driver, last_at=0.0, next_s=1.0)
    assert not is_alive({**driver, "start_ticks": 1}, last_at=0.0, next_s=1.0)


def test_another_machine_is_judged_by_the_age_of_its_heartbeat() -> None:
    driver = {**this_driver(), "machine": "elsewhere"}
    assert is_alive(driver, last_at=100.0, next_s=10.0, now=139.0)
    assert not is_alive(driver, last_at=100.0, next_s=10.0, now=141.0)
