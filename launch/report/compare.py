"""Evaluations compared row by row: what each model has more or less than the first, and whether that is chance.

A row of one report is that of another where the model read the same: example, question, choices, template.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.records.artifacts import find_artifact
from launch.records.record import RunRecord
from recipes.errors import RequestError
from recipes.stages.kinds import compares_models
from recipes.stages.suites import FIGURES_FILE
from trainers.evaluation.intervals import Difference, mean_interval, paired
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

LEVEL = 0.05
"""Of a difference that is marked."""

Row = Mapping[str, Any]
Key = tuple[str, int]
"""What was asked, and how often before."""


@dataclass(frozen=True)
class Side:
    """A model of a report."""

    name: str
    rows: Mapping[str, Mapping[Key, Row]]
    """By benchmark."""
    figures: Mapping[str, Mapping[str, Sequence[str]]]
    """Of each benchmark its `metrics`, and those `judged`, of which more is better."""


@dataclass(frozen=True)
class Figure:
    """A figure of a model next to the first one's, on the rows of both."""

    benchmark: str
    metric: str
    model: str
    first: tuple[float, float, float]
    """Mean and 95 % interval."""
    own: tuple[float, float, float]
    difference: Difference
    is_judged: bool
    changed: Sequence[tuple[Row, Row]]
    """Rows with another value, first and own, the largest losses first."""
    rows: int

    @property
    def name(self) -> str:
        """As gates have it."""
        return f"{self.benchmark}.{self.metric}"

    @property
    def verdict(self) -> str:
        """`worse` or `better` where the difference is hardly chance, else nothing."""
        if not self.is_judged or self.difference.p >= LEVEL:
            return ""
        return "worse" if self.difference.mean < 0 else "better"

    def step(self, rows: tuple[Row, Row]) -> float:
        """What a row has more than in the first model's report."""
        first, own = rows
        return float(own["values"][self.metric] - first["values"][self.metric])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        names = ("mean", "low", "high")
        lost = [rows[1]["id"] for rows in self.changed if self.step(rows) < 0]
        gained = [rows[1]["id"] for rows in self.changed if self.step(rows) > 0]
        return {
            "benchmark": self.benchmark, "metric": self.metric, "model": self.model, "rows": self.rows,
            "first": dict(zip(names, self.first, strict=True)), "own": dict(zip(names, self.own, strict=True)),
            "difference": self.difference._asdict(), "verdict": self.verdict, "lost": lost, "gained": gained,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Models next to the first of them."""

    models: Sequence[str]
    figures: Sequence[Figure]
    apart: Sequence[str]
    """Benchmarks that not every model has, with those that have it."""

    def failed(self, gates: Mapping[str, float]) -> list[str]:
        """Say which figures may be worse by more than a gate allows; raises RequestError for one that is not there."""
        reasons = []
        for name, most in gates.items():
            there = [figure for figure in self.figures if figure.name == name]
            if not there:
                known = ", ".join(dict.fromkeys(figure.name for figure in self.figures))
                raise RequestError(f"--gate {name}: no such figure; there are {known}")
            reasons += [
                f"{figure.model} {name}: the difference may be {figure.difference.low:+.4f} (95 %), below {-most:+.4f}"
                for figure in there
                if figure.difference.low < -most
            ]
        return reasons

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "models": list(self.models),
            "figures": [figure.to_json() for figure in self.figures],
            "apart": list(self.apart),
        }


def compare(sides: Sequence[Side], *, common: bool = False) -> Comparison:
    """Compare every model with the first; raises RequestError where they were not asked the same.

    With `common` the rows that two models have in common are compared and the others left out.
    """
    first, *others = sides
    if not others:
        raise RequestError(f"{first.name} is the only model: give two reports, or one of several models")
    figures = [figure for other in others for figure in _figures(first, other, common=common)]
    if not figures:
        listed = "; ".join(f"{side.name} has {', '.join(side.rows) or 'none'}" for side in sides)
        raise RequestError(f"the reports have no benchmark in common: {listed}")
    apart = []
    for name in dict.fromkeys(name for side in sides for name in side.rows):
        having = [side.name for side in sides if name in side.rows]
        if len(having) < len(sides):
            apart.append(f"{name}: only {', '.join(having)}")
    return Comparison([side.name for side in sides], figures, apart)


def _figures(first: Side, other: Side, *, common: bool) -> Iterator[Figure]:
    for name, theirs in first.rows.items():
        if name not in other.rows:
            continue
        own = other.rows[name]
        both = [key for key in theirs if key in own]
        if not both or (len(both) < max(len(theirs), len(own)) and not common):
            raise RequestError(_unlike(name, first, other))
        known, forms = other.figures[name]["metrics"], first.figures[name]
        pairs = [(theirs[key], own[key]) for key in both]
        for metric in forms["metrics"]:
            having = [pair for pair in pairs if all(metric in row["values"] for row in pair)]
            if metric in known and having:
                yield _figure(name, metric, other.name, having, forms["judged"])


def _figure(benchmark: str, metric: str, model: str, pairs: Sequence[tuple[Row, Row]], judged: Sequence[str]) -> Figure:
    first, own = ([pair[place]["values"][metric] for pair in pairs] for place in (0, 1))
    steps = [after - before for before, after in zip(first, own, strict=True)]
    order = sorted((place for place, step in enumerate(steps) if step), key=lambda place: (steps[place], place))
    changed = [pairs[place] for place in order]
    return Figure(
        benchmark, metric, model, mean_interval(first), mean_interval(own), paired(first, own), metric in judged,
        changed, len(pairs),
    )  # fmt: skip


def _unlike(name: str, first: Side, other: Side) -> str:
    """Why rows of two reports are not the same."""
    theirs, own = first.rows[name], other.rows[name]
    lone = {row["id"]: row for key, row in theirs.items() if key not in own}
    otherwise = [row["id"] for key, row in own.items() if key not in theirs and row["id"] in lone]
    text = f"benchmark {name}: {first.name} was asked {len(theirs)} rows, {other.name} {len(own)}, "
    text += f"{len(theirs.keys() & own.keys())} of them the same"
    if otherwise:
        before = lone[otherwise[0]]
        after = next(row for row in own.values() if row["id"] == otherwise[0])
        text += f"; {otherwise[0]} was asked otherwise: "
        if before["question"] == after["question"] and before["answer"] == after["answer"]:
            text += "the same question after other examples or by another template"
        else:
            text += f"{before['question'][-80:]!r} ({before['answer']!r}) and {after['question'][-80:]!r} "
            text += f"({after['answer']!r})"
    elif lone:
        text += f"; {next(iter(lone))} is in {first.name} alone: other data, or another max_tokens or tokenizer"
    return f"{text}; --common compares the rows that are the same"


def open_sides(store: Store, texts: Sequence[str]) -> list[Side]:
    """The models of the reports that a person names as RUN, RUN/STAGE, a name or a fingerprint, or one: REPORT:MODEL.

    Raises RequestError for what is no report of benchmarks.
    """
    sides: list[Side] = []
    for text in texts:
        place, colon, model = text.rpartition(":")
        if not colon or not place or not model.replace("_", "").isalnum():
            place, model = text, ""
        found = _read(store, place, _report(store, place))
        if model and model not in found:
            raise RequestError(f"{place} has no model {model!r}; it has {', '.join(found)}")
        sides += [side for label, side in found.items() if model in ("", label)]
    labels = Counter(side.name.rpartition(":")[2] for side in sides)
    if max(labels.values()) > 1:
        return sides
    return [Side(side.name.rpartition(":")[2], side.rows, side.figures) for side in sides]


def _report(store: Store, text: str) -> ArtifactManifest:
    is_run = text == "last" or any(run.startswith(text) for run in store.runs())
    if "/" in text or text in store.names() or not is_run:
        return find_artifact(store, text)
    stages = [entry.name for entry in RunRecord.open(store, text).summary().stages if compares_models(entry.kind)]
    if len(stages) != 1:
        raise RequestError(f"run {text} has {len(stages)} stages of kind evaluate: {', '.join(stages) or 'none'}")
    return find_artifact(store, f"{text}/{stages[0]}")


def _read(store: Store, text: str, manifest: ArtifactManifest) -> dict[str, Side]:
    """The models of a report, by their labels."""
    if FIGURES_FILE not in manifest.files:
        raise RequestError(f"{text} ({manifest.kind} of stage {manifest.stage}) holds no rows of benchmarks")
    figures = json.loads(store.objects.get_bytes(manifest.files[FIGURES_FILE].sha256))
    rows: dict[str, dict[str, dict[Key, Row]]] = {}
    for name in figures:
        seen: Counter[tuple[str, str]] = Counter()
        data = store.objects.get_bytes(manifest.files[f"rows/{name}.jsonl"].sha256)
        for row in map(json.loads, data.splitlines()):
            label, asked = row["model"], row["asked"]
            rows.setdefault(label, {}).setdefault(name, {})[asked, seen[label, asked]] = row
            seen[label, asked] += 1
    return {label: Side(f"{text}:{label}", found, figures) for label, found in rows.items()}


def interval(values: Sequence[float], *, signed: bool = False) -> str:
    """A mean with its interval, as people read it."""
    mean, low, high = (f"{value:+.3f}" if signed else f"{value:.3f}" for value in values)
    return f"{mean} [{low}, {high}]"
