"""The evaluate stage: every suite of the recipe measures every model; their findings make one report."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.errors import RequestError
from recipes.stages.evaluate import Bound, Evaluate
from recipes.stages.suites import FIGURES_FILE
from trainers.evaluation.suite import Parts, Suite
from trainers.models.load import model_family
from trainers.runtime.precision import use_fast_matmul
from trainers.training.context import Candidate, StageContext, candidate_folder, check_tokenizers, model_folder


def run_evaluate(spec: Evaluate, context: StageContext, suites: Sequence[Suite]) -> Candidate | None:
    """Measure models by the suites in turn; the candidate of the report comes from rank 0. Collective."""
    use_fast_matmul(context.ranks.device)
    _demand_measured(spec, context)
    labels = spec.labels()
    metrics: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    rows: dict[str, Sequence[dict[str, Any]]] = {}
    for number, measure in enumerate(suites):
        found = measure(spec, context, labels, Parts(number * len(labels), len(suites) * len(labels)))
        metrics |= found.metrics
        samples += found.samples
        rows |= found.rows
    context.observer.metrics(0, {name: value for name, value in metrics.items() if math.isfinite(value)})
    context.observer.phase("write")
    return _write_candidate(spec, context, metrics, samples, rows)


def _demand_measured(spec: Evaluate, context: StageContext) -> None:
    """Raise RequestError for a text model that the suites do not measure, or not together with the others."""
    if spec.is_image:
        return
    for index in range(len(spec.of)):
        found = spec.refuse_model(model_family(model_folder(context, f"of.{index}")))
        if found is not None:
            raise RequestError(f"of.{index} {spec.of[index]}: {found}")
    check_tokenizers(spec, context)


def _write_candidate(
    spec: Evaluate,
    context: StageContext,
    metrics: Mapping[str, float],
    samples: Sequence[dict[str, Any]],
    rows: Mapping[str, Sequence[dict[str, Any]]],
) -> Candidate | None:
    """Upload the report and the rows of benchmarks, and show its samples in the run's folder."""
    if context.ranks.rank != 0:
        return None
    finite = {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)}
    reasons = failed_bounds(spec.gates, finite)
    writer = context.samples()
    for line in samples:
        writer.append(line)
    writer.flush()
    with candidate_folder() as folder:
        figures = {name: {"metrics": item.metrics, "judged": item.judged} for name, item in spec.benchmarks.items()}
        contents = {"report.json": finite, "samples.json": samples, **({FIGURES_FILE: figures} if figures else {})}
        for name, content in contents.items():
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
        for name, lines in rows.items():
            (folder / "rows").mkdir(exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
            (folder / "rows" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        files = context.store.objects.put_folder(folder)
    return Candidate(
        kind="report",
        files=files,
        checks=(),
        outcome={"state": "completed", "rule": None, "steps_done": 0, "steps_planned": 0},
        metrics=finite,
        gate_reasons=tuple(reasons),
    )


def failed_bounds(gates: Sequence[Bound], metrics: Mapping[str, float]) -> list[str]:
    """Why the report's gate fails."""
    reasons = []
    for gate in gates:
        value = metrics.get(gate.metric)
        if value is None:
            reasons.append(f"there is no metric {gate.metric}; there are {', '.join(sorted(metrics))}")
        elif gate.min is not None and value < gate.min:
            reasons.append(f"{gate.metric} is {value:.4g}, below {gate.min}")
        elif gate.max is not None and value > gate.max:
            reasons.append(f"{gate.metric} is {value:.4g}, above {gate.max}")
    return reasons
