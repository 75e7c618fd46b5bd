"""What a person sees of a run: the plan, then one line per stage; live on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from recipes.stages.kinds import COUNTED, SHOWN_METRICS
from trainers.store.manifest import ArtifactManifest

PLAIN_EVERY_S = 10.0
LOST_SHARE = 0.1
"""A stage that loses a larger share of its rows says so when it is committed."""

ACTIVITIES = {
    "start": "starting workers",
    "join": "starting workers",
    "joined": "starting workers",
    "data": "preparing data",
    "model": "loading the model",
    "reference": "asking the reference",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving",
    "write": "writing the result",
    "verify": "verifying the result",
    "commit": "committing",
    "tokenizer": "training the tokenizer",
    "ngram": "counting n-grams",
    "answer": "answering prompts",
    "judge": "judging answers",
    "label": "waiting for labels",
    "targets": "writing held-out targets",
    "draw": "drawing",
    "features": "comparing features",
}
"""What a phase means to people; any other phase is shown by its own name."""


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan."""

    name: str
    kind: str
    inputs: str
    workers: str
    batch: str
    steps: str
    memory: str
    disk: str
    shard: str
    """Precision and engine."""
    state: str


@dataclass(frozen=True)
class ResultRow:
    """One line of the closing table."""

    name: str
    kind: str
    state: str
    seconds: float | None
    outcome: str
    gate: str
    fingerprint: str


class View(Protocol):
    """Shows a run's course."""

    def say(self, text: str) -> None: ...

    def plan(self, recipe: str, rows: Sequence[PlanRow], notes: Sequence[str] = ()) -> None: ...

    def stage_started(self, name: str, attempt: int) -> None: ...

    def beat(self, name: str, phase: str, values: Mapping[str, Any]) -> None: ...

    def stage_finished(self, name: str, state: str, seconds: float | None, detail: str) -> None: ...

    def results(self, rows: Sequence[ResultRow]) -> None: ...

    def close(self) -> None: ...


def span(seconds: float) -> str:
    """A duration as people write it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def rate(value: float) -> str:
    """A rate with at most four characters of digits."""
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    if value >= 1e4:
        return f"{value / 1e3:.0f}k"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}"


def rows_lost(metrics: Mapping[str, Any]) -> list[str]:
    """Say what share of the data's rows a stage could not use whole, where it is a notable share."""
    data = metrics.get("data") or {}
    rows = data.get("rows_in", 0)
    dropped = data.get("dropped", {})
    lost = sum(dropped.values())
    said = []
    if lost > LOST_SHARE * rows:
        why = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        said.append(f"{lost:,} of {rows:,} rows dropped ({why})")
    if data.get("truncated", 0) > LOST_SHARE * rows:
        said.append(f"{data['truncated']:,} of {rows:,} rows truncated")
    return said


def merge_losses(manifest: ArtifactManifest) -> list[str]:
    """Say how much of the adapters' update was lost by rounding the merged model, where it is a notable share."""
    checked = manifest.verification
    if checked is None or checked.merge_lost is None or checked.merge_lost < LOST_SHARE:
        return []
    lost = f"rounding the merged model lost {checked.merge_lost:.0%} of the adapters' update"
    return [f"{lost}; stages and `sample` open the adapters instead"]


class Pace:
    """Remaining time of one stage from the steps (or iterations) ended so far, recent ones weighing more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, float] | None = None
        self._per_step: float | None = None
        self._num_samples = 0

    def remaining_s(self, step: float | None, steps: float | None) -> float | None:
        """Seconds left, or None while nothing is known."""
        if step is None or not steps:
            return None
        now = self._clock()
        if self._last is None:
            self._last = (now, step)
        elif step > self._last[1]:
            sample = (now - self._last[0]) / (step - self._last[1])
            self._num_samples += 1
            weight = max(1 / self._num_samples, min(0.5, (step - self._last[1]) / max(steps * 0.1, 1)))
            # The first step warms everything up, so the second one takes its place.
            before = sample if self._per_step is None or self._num_samples == 2 else self._per_step
            self._per_step = (1 - weight) * before + weight * sample
            self._last = (now, step)
        if self._per_step is None:
            return None
        return max(self._per_step * (steps - step) - (now - self._last[0]), 0.0)


def describe(phase: str, values: Mapping[str, Any], remaining_s: float | None = None) -> str:
    """One stage's line: where it is, how fast, how well, how long still."""
    step, steps, unit = values.get("step"), values.get("steps"), values.get("unit", "step")
    parts = []
    if step is not None and steps is not None:
        # Steps and labels are counted when they are done; an iteration or a model is worked on for long.
        shown = step if unit in ("step", "label") else min(step + 1, steps)
        parts.append(f"{unit} {shown:,}/{steps:,}")
    if phase != "train" or step is None:
        parts.append(activity(phase))
    parts += _describe_rows(values)
    for name in SHOWN_METRICS:
        if isinstance(values.get(name), int | float):
            parts.append(f"{name} {values[name]:.4g}")
    for counted in COUNTED:
        if values.get(f"{counted}_per_s"):
            parts.append(f"{rate(values[f'{counted}_per_s'])} {counted.replace('_', ' ')}/s")
    remaining_s = rows_remaining_s(values) if values.get("row") is not None and unit == "part" else remaining_s
    if remaining_s is not None and (values.get("rows") or (steps or 0) > (step or 0)):
        parts.append(f"ETA {span(remaining_s)}")
    if values.get("silent_s", 0.0) >= PLAIN_EVERY_S:
        parts.append(f"for {span(values['silent_s'])}")
    return " · ".join(part for part in parts if part)


def _describe_rows(values: Mapping[str, Any]) -> list[str]:
    """Rows of a phase: how many are done, of how many, how many a second."""
    row, rows, per_s = values.get("row"), values.get("rows"), values.get("row_rate")
    if row is None:
        return []
    return [f"row {row:,}" + (f"/{rows:,}" if rows else ""), *([f"{rate(per_s)} rows/s"] if per_s else [])]


def rows_remaining_s(values: Mapping[str, Any]) -> float | None:
    """Seconds until the rows of a phase are done, or None while nothing is known."""
    rows, per_s = values.get("rows"), values.get("row_rate")
    return (rows - values["row"]) / per_s if rows and per_s else None


def activity(phase: str) -> str:
    """A phase in words."""
    return ACTIVITIES.get(phase, phase)


def plan_table(recipe: str, rows: Sequence[PlanRow]) -> Table:
    """The plan as a table."""
    table = Table(title=f"plan of {recipe}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for head in ("stage", "kind", "from", "workers", "batch", "steps", "memory", "disk", "runs in", ""):
        table.add_column(head, justify="right" if head in ("steps", "memory", "disk") else "left", header_style="dim")
    for row in rows:
        style = "dim" if row.state == "cached" else ""
        table.add_row(
            row.name,
            row.kind,
            row.inputs,
            row.workers,
            row.batch,
            row.steps,
            row.memory,
            row.disk,
            row.shard,
            row.state,
            style=style,
        )
    return table


def result_table(rows: Sequence[ResultRow]) -> Table:
    """The closing table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("stage", "kind", "state", "time", "outcome", "gate", "fingerprint"):
        table.add_column(head, header_style="dim", justify="right" if head == "time" else "left")
    for row in rows:
        color = {"committed": "green", "cached": "cyan", "failed": "red"}.get(row.state, "")
        seconds = "" if row.seconds is None else span(row.seconds)
        gate = Text(row.gate, style="red" if row.gate == "failed" else "")
        table.add_row(
            row.name, row.kind, Text(row.state, style=color), seconds, row.outcome, gate, row.fingerprint[:12]
        )
    return table


class PlainView:
    """Plain lines, at most one in `every_s` seconds and stage besides starts and ends."""

    def __init__(
        self, console: Console, every_s: float = PLAIN_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._every_s = every_s
        self._clock = clock
        self._paces: dict[str, Pace] = {}
        self._shown_at: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def plan(self, recipe: str, rows: Sequence[PlanRow], notes: Sequence[str] = ()) -> None:
        """Print the plan."""
        self._console.print(plan_table(recipe, rows))
        for note in notes:
            self.say(note)

    def stage_started(self, name: str, attempt: int) -> None:
        """Print that a stage starts."""
        self._paces[name] = Pace(self._clock)
        self._shown_at[name] = self._clock()
        self.say(f"{name}: started" + (f" (attempt {attempt})" if attempt > 1 else ""))

    def beat(self, name: str, phase: str, values: Mapping[str, Any]) -> None:
        """Print the stage's line when it is time."""
        remaining = self._paces.setdefault(name, Pace(self._clock)).remaining_s(values.get("step"), values.get("steps"))
        now = self._clock()
        if now - self._shown_at.get(name, -self._every_s) >= self._every_s:
            self._shown_at[name] = now
            self.say(f"{name}: {describe(phase, values, remaining)}")

    def stage_finished(self, name: str, state: str, seconds: float | None, detail: str) -> None:
        """Print how a stage ended."""
        took = "" if seconds is None else f" in {span(seconds)}"
        self.say(f"{name}: {state}{took}" + (f" · {detail}" if detail else ""))

    def results(self, rows: Sequence[ResultRow]) -> None:
        """Print the closing table."""
        self._console.print(result_table(rows))

    def close(self) -> None:
        """Nothing is held open."""


class LiveView:
    """One live line per stage on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = RichProgress(
            TextColumn("{task.fields[mark]}"),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            refresh_per_second=5,
        )
        self._tasks: dict[str, Any] = {}
        self._paces: dict[str, Pace] = {}

    def say(self, text: str) -> None:
        """Print a line above the live ones."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def plan(self, recipe: str, rows: Sequence[PlanRow], notes: Sequence[str] = ()) -> None:
        """Print the plan and open one line per stage."""
        self._console.print(plan_table(recipe, rows))
        for note in notes:
            self.say(note)
        self._console.print()
        for row in rows:
            self._tasks[row.name] = self._progress.add_task(row.name, total=1, start=False, mark="·", text="waiting")
        self._progress.start()

    def stage_started(self, name: str, attempt: int) -> None:
        """Mark a stage as running."""
        self._paces[name] = Pace()
        text = "starting" if attempt == 1 else f"starting (attempt {attempt})"
        self._progress.start_task(self._tasks[name])
        self._progress.update(self._tasks[name], total=None, mark="[yellow]▸", text=text)

    def beat(self, name: str, phase: str, values: Mapping[str, Any]) -> None:
        """Move a stage's line."""
        step, steps = values.get("step"), values.get("steps")
        remaining = self._paces.setdefault(name, Pace()).remaining_s(step, steps)
        self._progress.update(
            self._tasks[name], total=steps or None, completed=step or 0, text=describe(phase, values, remaining)
        )

    def stage_finished(self, name: str, state: str, seconds: float | None, detail: str) -> None:
        """Close a stage's line."""
        mark = {"committed": "[green]✓", "cached": "[cyan]✓", "failed": "[red]✗"}.get(state, "·")
        took = "" if seconds is None else f" in {span(seconds)}"
        text = f"{state}{took}" + (f" · {detail}" if detail else "")
        done = {"total": 1, "completed": 1} if state in ("committed", "cached") else {}
        self._progress.update(self._tasks[name], mark=mark, text=text.splitlines()[0], **done)  # type: ignore[arg-type]

    def results(self, rows: Sequence[ResultRow]) -> None:
        """Print the closing table."""
        self.close()
        self._console.print()
        self._console.print(result_table(rows))

    def close(self) -> None:
        """Leave the lines as they are."""
        self._progress.stop()


class SilentView:
    """Shows nothing: for calls from Python."""

    def say(self, text: str) -> None:
        """Nothing."""

    def plan(self, recipe: str, rows: Sequence[PlanRow], notes: Sequence[str] = ()) -> None:
        """Nothing."""

    def stage_started(self, name: str, attempt: int) -> None:
        """Nothing."""

    def beat(self, name: str, phase: str, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def stage_finished(self, name: str, state: str, seconds: float | None, detail: str) -> None:
        """Nothing."""

    def results(self, rows: Sequence[ResultRow]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def build_view(console: Console | None = None) -> View:
    """Live lines on a terminal, else plain lines."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return PlainView(Console(width=max(console.width, 140), highlight=False))
