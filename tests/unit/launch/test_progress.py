"""Lines that a person reads while a run goes on."""

import io
from typing import Any

import pytest
from rich.console import Console

from launch.report.progress import LiveView, Pace, PlainView, PlanRow, ResultRow, describe, rate, rows_lost, span


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "text"), [(1.23, "1.2 s"), (59, "59 s"), (61, "1:01 min"), (3725, "1:02 h")])
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(3.14, "3.1"), (150, "150"), (12_345, "12k"), (2_500_000, "2.5M")])
def test_rate(value: float, text: str) -> None:
    assert rate(value) == text


def test_rows_that_a_stage_could_not_use_are_spoken_of() -> None:
    lost = {"rows_in": 1969, "dropped": {"equal_pair": 2, "too_long": 1774}, "truncated": 0}
    assert rows_lost({"data": lost}) == ["1,776 of 1,969 rows dropped (equal_pair 2, too_long 1,774)"]
    assert rows_lost({"data": {"rows_in": 100, "dropped": {}, "truncated": 11}}) == ["11 of 100 rows truncated"]
    assert rows_lost({"data": {"rows_in": 100, "dropped": {"empty": 10}, "truncated": 10}}) == []
    assert rows_lost({"score": 1.0}) == []


def test_pace_counts_down_by_the_measured_step_time() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.remaining_s(0, 100) is None
    clock.now = 20.0
    assert pace.remaining_s(10, 100) == pytest.approx(180.0)
    clock.now = 25.0
    assert pace.remaining_s(10, 100) == pytest.approx(175.0), "it counts down between two steps"
    assert pace.remaining_s(100, 100) == 0
    assert pace.remaining_s(None, 100) is None


def test_pace_of_iterations_is_right_from_the_second_one_on() -> None:
    clock = Clock()
    pace = Pace(clock)
    total, took = 14, [20.0] + [15.0] * 13
    for done in range(total + 1):
        for beat_s in (0.0, 5.0, 9.0):  # rollout and updates of one iteration beat many times
            clock.now = sum(took[:done]) + beat_s
            left = pace.remaining_s(done, total)
            wanted = sum(took) - clock.now
            if 1 <= done < total:
                assert left is not None
                assert wanted / 1.5 <= left <= wanted * 1.5
            elif done == 0:
                assert left is None


@pytest.mark.parametrize(
    ("phase", "values", "text"),
    [
        (
            "train",
            {"step": 10, "steps": 100, "loss": 2.34567, "tokens_per_s": 45_123.0},
            "step 10/100 · loss 2.346 · 45k tokens/s · ETA 1:01 min",
        ),
        (
            "rollout",
            {"step": 2, "steps": 14, "unit": "iteration", "score": 0.5, "responses_per_s": 7.25},
            "iteration 3/14 · rollout · score 0.5 · 7.2 responses/s · ETA 1:01 min",
        ),
        ("rollout", {"step": 14, "steps": 14, "unit": "iteration"}, "iteration 14/14 · rollout"),
        ("train", {"step": 0, "steps": 8, "pairs_per_s": 75.5}, "step 0/8 · 75.5 pairs/s · ETA 1:01 min"),
        ("join", {}, "starting workers"),
        (
            "perplexity",
            {"step": 1, "steps": 4, "unit": "part", "row": 128, "rows": 1021, "row_rate": 35.0},
            "part 2/4 · perplexity · row 128/1,021 · 35.0 rows/s · ETA 26 s",
        ),
        ("data", {"row": 12_000, "row_rate": 950.0}, "preparing data · row 12,000 · 950 rows/s"),
        (
            "evaluate",
            {"step": 50, "steps": 100, "row": 8, "rows": 64},
            "step 50/100 · evaluating · row 8/64 · ETA 1:01 min",
        ),
        ("model", {"silent_s": 35.0}, "loading the model · for 35 s"),
    ],
)
def test_describe_says_place_score_speed_and_eta(phase: str, values: dict[str, Any], text: str) -> None:
    assert describe(phase, values, 61.0) == text


def test_plain_lines_are_rare_but_starts_and_ends_always_show() -> None:
    clock, out = Clock(), io.StringIO()
    view = PlainView(Console(file=out, width=200), every_s=10, clock=clock)
    view.stage_started("base", 1)
    for step in range(1, 26):
        clock.now += 1
        view.beat("base", "train", {"step": step, "steps": 25, "loss": 1.0})
    view.stage_finished("base", "committed", 25.0, "loss 1.0")
    lines = out.getvalue().splitlines()
    assert lines[0] == "base: started"
    assert lines[-1] == "base: committed in 25 s · loss 1.0"
    assert 2 <= len(lines) - 2 <= 4


def test_tables_hold_every_row() -> None:
    out = io.StringIO()
    view = PlainView(Console(file=out, width=200))
    view.plan(
        "demo",
        [PlanRow("base", "pretrain", "", "2 CPU", "8 x 2 x 4", "200", "1.0 GiB", "20 MiB", "bf16 plain", "to run")],
    )
    view.results([ResultRow("base", "pretrain", "committed", 1.0, "completed", "passed", "ab" * 32)])
    text = out.getvalue()
    assert "plan of demo" in text
    assert "8 x 2 x 4" in text
    assert "bf16 plain" in text
    assert "abababababab" in text


def test_a_terminal_shows_one_live_line_per_stage() -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, width=160, force_terminal=True, legacy_windows=False))
    rows = [
        PlanRow(name, "pretrain", "", "2", "8 x 2 x 4", "200", "-", "-", "fp32 zero 2", "to run")
        for name in ("base", "chat")
    ]
    view.plan("demo", rows)
    view.stage_started("base", 2)
    view.beat("base", "train", {"step": 3, "steps": 10, "loss": 1.5, "note": "[red]"})
    view.stage_finished("base", "committed", 2.0, "gate failed: [why]")
    view.stage_finished("chat", "failed", None, "first line\nsecond line")
    view.results([ResultRow("base", "pretrain", "committed", 2.0, "completed", "failed", "ab" * 32)])
    text = out.getvalue()
    last = text[text.rfind("base") - 200 :]
    assert "committed in 2.0 s" in text
    assert "gate failed: [why]" in text
    assert "first line" in text
    assert "second line" not in text
    assert "abababababab" in last
