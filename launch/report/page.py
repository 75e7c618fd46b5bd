"""report.html: one self-contained page about a run, made from its journal, metrics, samples and manifests.

`render` is a pure function of `RunReport`; `launch.report.collect` reads one from a store.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from launch.report.by_model import by_model, flatten
from launch.report.charts import Node, Series, line_chart, lineage_graph, number
from recipes.stages.kinds import compares_models, first_curves
from recipes.stages.suites import noise_findings
from trainers.store.manifest import Verification

HELD_OUT = ("eval/", "held_out_", "eval_")
SHOWN_PROMPTS = 12
IMAGE = "data:image/png;base64,"

Values = dict[str, list[tuple[float, float]]]


@dataclass
class StageReport:
    """What the page says about one stage."""

    name: str
    kind: str
    state: str
    parents: list[str]
    fingerprint: str | None = None
    digest: str | None = None
    seconds: float | None = None
    attempts: int = 0
    error: str | None = None
    curves: Values = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    builds: dict[str, dict[str, Any]] = field(default_factory=dict)
    shard: str = ""
    """Precision and engine."""

    @property
    def compares_models(self) -> bool:
        """Whether its result is a report on models."""
        return compares_models(self.kind)


@dataclass
class RunReport:
    """What the page is made of."""

    run: str
    recipe: str
    state: str
    stages: list[StageReport]
    recipe_text: str
    message: str | None = None
    facts: dict[str, str] = field(default_factory=dict)


def curves_of(records: Iterable[Mapping[str, Any]]) -> Values:
    """Metric name -> points by step; a later record of the same step replaces an earlier one (a resumed attempt)."""
    by_name: dict[str, dict[float, float]] = {}
    for record in records:
        for name, value in flatten(record.get("values", {})).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                by_name.setdefault(name, {})[float(record["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in by_name.items()}


def _held_out_base(name: str) -> str | None:
    return next((name.removeprefix(prefix) for prefix in HELD_OUT if name.startswith(prefix)), None)


def _rank(name: str, first: Sequence[str]) -> tuple[int, str]:
    base = _held_out_base(name) or name
    return (first.index(base) if base in first else len(first), name)


def stage_charts(curves: Values, first: Sequence[str]) -> tuple[list[str], list[str]]:
    """The charts of one stage: those of the first curves, and those to fold; a held-out curve lies over its training
    curve.
    """
    shown: list[str] = []
    folded: list[str] = []
    for name in sorted(curves, key=lambda name: _rank(name, first)):
        if _held_out_base(name) in curves:
            continue
        over = next((prefix + name for prefix in HELD_OUT if prefix + name in curves), None)
        lines = [Series("training" if over else "", curves[name], 0)]
        if over:
            lines.append(Series("held out", curves[over], 1))
        if max(len(line.points) for line in lines) < 2:
            continue
        base = _held_out_base(name) or name
        title = base.replace("_", " ") + (", held out" if base != name else "")
        chart = line_chart(title, lines)
        if chart:
            (shown if base in first else folded).append(chart)
    return shown, folded


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(float(value)) if not isinstance(value, int) else f"{value:,}"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return ", ".join(number(float(item)) for item in value[:6])
    return escape(value if isinstance(value, str) else json.dumps(value))


def _badge(text: str, tone: str = "") -> str:
    return f'<span class="badge {tone}">{escape(text)}</span>'


def _gate(stage: StageReport) -> str:
    gate = (stage.manifest or {}).get("gate") or {}
    if not gate:
        return _badge("none")
    if gate.get("passed"):
        return _badge("passed", "ok")
    return _badge("failed", "bad") + "".join(
        f'<div class="soft">{escape(str(why))}</div>' for why in gate.get("reasons", [])
    )


def _tone(state: str) -> str:
    return {"committed": "ok", "completed": "ok", "cached": "ok", "failed": "bad", "lost": "bad"}.get(state, "")


def _stage_table(stages: Sequence[StageReport]) -> str:
    rows = []
    for stage in stages:
        manifest = stage.manifest or {}
        outcome = manifest.get("outcome") or {}
        done = outcome.get("steps_done")
        steps = f"{done:,} / {outcome.get('steps_planned', done):,}" if done else "-"
        if outcome.get("state") == "stopped_by":
            steps += f' <span class="soft">stopped by {escape(str(outcome.get("rule")))}</span>'
        size = sum(entry["bytes"] for entry in manifest.get("files", {}).values())
        rows.append(
            f"<tr><td><b>{escape(stage.name)}</b></td><td>{escape(stage.kind)}</td>"
            f"<td>{_badge(stage.state, _tone(stage.state))}</td><td>{escape(stage.shard)}</td>"
            f"<td>{steps}</td><td>{_seconds(stage.seconds)}</td>"
            f"<td>{_gate(stage)}</td><td>{_size(size) if size else '-'}</td>"
            f'<td class="mono" title="{escape(stage.digest or "")}">{escape((stage.fingerprint or "-")[:12])}</td></tr>'
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("stage", "kind", "state", "runs in", "steps", "time", "gate", "size", "fingerprint")
    )
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _lineage(report: RunReport) -> str:
    names = {stage.name for stage in report.stages}
    nodes = []
    for outside in dict.fromkeys(parent for stage in report.stages for parent in stage.parents if parent not in names):
        nodes.append(Node(outside, "from outside", "external"))
    for stage in report.stages:
        nodes.append(Node(stage.name, f"{stage.kind} · {stage.state}", stage.state, tuple(stage.parents)))
    return f'<div class="card">{lineage_graph(nodes)}</div>'


def metric_table(metrics: Mapping[str, Any], first: Sequence[str]) -> str:
    """Metrics as a table, the first ones on top; names of the form model.metric become one column per model."""
    models, by_metric, plain = by_model(metrics)
    parts = [f'<p class="warning">{escape(finding)}</p>' for finding in noise_findings(metrics)]
    if by_metric:
        head = "".join(f"<th>{escape(model)}</th>" for model in models)
        rows = "".join(
            f"<tr><td>{escape(metric.replace('_', ' '))}</td>"
            + "".join(f'<td class="num">{_cell(cells[model]) if model in cells else "-"}</td>' for model in models)
            + "</tr>"
            for metric, cells in sorted(by_metric.items(), key=lambda item: _rank(item[0], first))
        )
        parts.append(f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>")
    if plain:
        rows = "".join(
            f'<tr><td>{escape(name.replace("_", " "))}</td><td class="num">{_cell(value)}</td></tr>'
            for name, value in plain.items()
        )
        parts.append(f"<table><tbody>{rows}</tbody></table>")
    return f'<div class="card">{"".join(parts)}</div>' if parts else ""


def _score(sample: Mapping[str, Any]) -> str:
    """The score of a sample, and what the terms of a reward gave it."""
    score, rewards = sample.get("score"), sample.get("rewards") or {}
    terms = ", ".join(f"{name} {value:.2f}" for name, value in rewards.items())
    if not isinstance(score, int | float) or not math.isfinite(score):
        return escape(terms)
    return escape(f"score {score:.2f}" + (f" ({terms})" if terms else ""))


def side_by_side(samples: Sequence[Mapping[str, Any]], limit: int = SHOWN_PROMPTS) -> str:
    """Answers of several models to the same prompts, next to each other; the best-scored one of a row is marked."""
    by_prompt: dict[str, dict[str, Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), {})[str(sample.get("model", "model"))] = sample
    cards = []
    for prompt, answers in list(by_prompt.items())[:limit]:
        scores = {who: s["score"] for who, s in answers.items() if isinstance(s.get("score"), int | float)}
        best = max(scores, key=lambda who: scores[who]) if len(scores) > 1 else None
        cells = "".join(
            f'<div class="answer{" best" if who == best else ""}"><div class="who"><b>{escape(who)}</b>'
            f"<span>{_score(sample)}</span></div>{escape(str(sample.get('response', '')))}</div>"
            for who, sample in answers.items()
        )
        cards.append(
            f'<div class="sample"><div class="prompt">{escape(prompt)}</div><div class="answers">{cells}</div></div>'
        )
    return "".join(cards)


def grids_over_training(samples: Sequence[Mapping[str, Any]], limit: int = 6) -> str:
    """Grids of images at fixed seeds, evenly over the training, the last one included; drawn again after a resume."""
    by_step = {int(s.get("step", 0)): str(s["image"]) for s in samples if str(s.get("image", "")).startswith(IMAGE)}
    steps = sorted(by_step)
    if len(steps) > limit:
        steps = [steps[round(place * (len(steps) - 1) / (limit - 1))] for place in range(limit)]
    figures = "".join(
        f'<figure class="chart"><figcaption>step {step:,}</figcaption>'
        f'<img class="grid-image" alt="images drawn after step {step}" src="{escape(by_step[step])}"></figure>'
        for step in steps
    )
    return f'<div class="charts">{figures}</div>' if figures else ""


def grids_of_models(samples: Sequence[Mapping[str, Any]]) -> str:
    """The images of each model of an evaluation."""
    figures = "".join(
        f'<figure class="chart"><figcaption>{escape(str(sample["model"]))}</figcaption>'
        f'<img class="grid-image" alt="images of {escape(str(sample["model"]))}" '
        f'src="{escape(str(sample["image"]))}"></figure>'
        for sample in samples
        if str(sample["image"]).startswith(IMAGE)
    )
    return f'<div class="charts">{figures}</div>'


def over_training(samples: Sequence[Mapping[str, Any]], limit: int = 4) -> str:
    """The first and last answers that a stage kept while it trained, by prompt where the same one came again."""
    steps = sorted({int(sample.get("step", 0)) for sample in samples})
    if not steps:
        return ""
    chosen = [steps[0]] if len(steps) == 1 else [steps[0], steps[-1]]
    cards = []
    for step in chosen:
        for sample in [s for s in samples if int(s.get("step", 0)) == step][:limit]:
            cards.append(
                f'<div class="sample"><div class="prompt">{escape(str(sample.get("prompt", "")))}</div>'
                f'<div class="answers"><div class="answer"><div class="who"><b>step {step}</b>'
                f"<span>{_score(sample)}</span></div>"
                f"{escape(str(sample.get('response', '')))}</div></div></div>"
            )
    return "".join(cards)


def _builds(builds: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, build in builds.items():
        facts = ", ".join(
            f"{escape(key.replace('_', ' '))} {_cell(value)}"
            for key, value in build.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )
        dropped = build.get("dropped") or {}
        why = "; dropped: " + ", ".join(f"{escape(str(k))} {v:,}" for k, v in dropped.items()) if dropped else ""
        filtered = build.get("filtered") or {}
        why += "; left out by filters: " if filtered else ""
        why += ", ".join(f"{escape(str(k))} {v:,}" for k, v in filtered.items())
        for source, counts in (build.get("sources") or {}).items():
            held = ", ".join(f"{escape(key.replace('_', ' '))} {_cell(value)}" for key, value in counts.items())
            why += f"<br>{escape(source)}: {held}"
        parts.append(f'<p class="soft"><b>{escape(name)}</b>: {facts}{why}</p>')
    return "".join(parts)


def _stage_section(stage: StageReport) -> str:
    first = first_curves(stage.kind)
    charts, folded = stage_charts(stage.curves, first)
    parts = [
        f'<h2 id="{escape(stage.name)}">{escape(stage.name)} <span class="soft">· {escape(stage.kind)}</span></h2>'
    ]
    if stage.error:
        parts.append(f'<div class="card"><pre>{escape(stage.error)}</pre></div>')
    if charts:
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    if folded:
        parts.append(
            f"<details><summary>{len(folded)} more curves</summary>"
            f'<div class="charts">{"".join(folded)}</div></details>'
        )
    metrics = {name: value for name, value in ((stage.manifest or {}).get("metrics") or {}).items() if name != "data"}
    table = metric_table(metrics, first)
    if table and stage.compares_models:
        parts.append(table)
    elif table:
        parts.append(f"<details><summary>final numbers</summary>{table}</details>")
    drawn = [sample for sample in stage.samples if "image" in sample]
    if drawn and stage.compares_models:
        parts.append(grids_of_models(drawn))
    elif drawn:
        parts.append(grids_over_training(drawn))
    elif stage.samples and not stage.compares_models:
        parts.append(f"<details><summary>samples while training</summary>{over_training(stage.samples)}</details>")
    if stage.builds:
        parts.append(
            f"<details><summary>data: what was read and what was left out</summary>{_builds(stage.builds)}</details>"
        )
    if stage.manifest:
        checked = stage.manifest.get("verification") or {}
        if checked.get("how"):
            shown = Verification.model_validate(checked).text
            parts.append(f'<p class="soft">verified before commit: {escape(shown)}</p>')
    return "".join(parts) if len(parts) > 1 else ""


def _tiles(report: RunReport) -> str:
    tiles = [(value, name) for name, value in report.facts.items()]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles)
        + "</div>"
    )


@cache
def _style() -> str:
    return files("launch.report").joinpath("page.css").read_text()


def render(report: RunReport) -> str:
    """The page, without a single reference to anything outside it."""
    body = [
        f"<h1>{escape(report.recipe)}</h1>",
        f'<p class="soft">run <span class="mono">{escape(report.run)}</span> '
        f"{_badge(report.state, _tone(report.state))}</p>",
    ]
    if report.message:
        body.append(f'<div class="card"><pre>{escape(report.message)}</pre></div>')
    if report.facts:
        body.append(_tiles(report))
    body += ["<h2>Lineage</h2>", _lineage(report), "<h2>Stages</h2>", _stage_table(report.stages)]
    for stage in report.stages:
        if stage.compares_models and stage.samples:
            if any("image" in sample for sample in stage.samples):
                continue
            body += [
                f"<h2>Before and after <span class='soft'>· {escape(stage.name)}</span></h2>",
                side_by_side(stage.samples),
            ]
    body += [_stage_section(stage) for stage in report.stages]
    body.append(f'<h2>Recipe</h2><div class="card"><pre>{escape(report.recipe_text)}</pre></div>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.recipe)} · {escape(report.run)}</title><style>{_style()}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
