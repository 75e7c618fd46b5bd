"""Reads what the report shows: a run's folder, the artifacts it made, the runs that computed its cached stages."""

import contextlib
from typing import Any

import yaml

from launch.inputs.resolved import Resolved
from launch.records.journal import RunSummary
from launch.records.record import RunRecord, origin_of
from launch.report.page import RunReport, StageReport, curves_of
from launch.report.progress import span
from recipes.errors import TrainwrightError
from recipes.stages.kinds import Stage
from recipes.stages.suites import NOISE, TRUTH
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store


def collect(record: RunRecord) -> RunReport:
    """Gather a run's report; what can no longer be read is left out."""
    summary = record.summary()
    raw = record.raw
    resolved = Resolved.from_json(raw)
    stages = []
    for entry in summary.stages:
        inputs = {path: reference.stage for path, reference in resolved.internal[entry.name].items()}
        outside = {path: made.source or made.stage for path, made in resolved.external.get(entry.name, {}).items()}
        manifest = _manifest(record.store, entry.fingerprint) if entry.state in ("committed", "cached") else None
        source = record
        if entry.state == "cached" and entry.fingerprint is not None:
            source = origin_of(record.store, entry.fingerprint, record.run) or record
        stage_name = entry.name if source is record else _name_in(source, entry.fingerprint, entry.name)
        metrics = [*source.metrics(stage_name)]
        stages.append(
            StageReport(
                name=entry.name,
                kind=entry.kind,
                state=entry.state,
                parents=list(dict.fromkeys([*inputs.values(), *outside.values()])),
                fingerprint=entry.fingerprint,
                digest=entry.digest,
                seconds=entry.seconds if entry.state != "cached" else None,
                attempts=entry.attempts,
                error=entry.error,
                curves=curves_of(line for line in metrics if "step" in line),
                samples=list(source.samples(stage_name)),
                manifest=manifest.model_dump(mode="json") if manifest else None,
                builds=_builds(manifest),
                shard=_shard(resolved.recipe.stages[entry.name], is_cached=entry.state == "cached"),
            )
        )
    recipe_text = yaml.safe_dump(_without_defaults(raw["recipe"]), sort_keys=False, allow_unicode=True, width=100)
    return RunReport(
        run=record.run,
        recipe=summary.recipe,
        state=summary.state,
        stages=stages,
        recipe_text=recipe_text,
        message=summary.message if summary.state != "completed" else None,
        facts=_facts(summary, raw, stages),
    )


def _shard(stage: Stage, *, is_cached: bool) -> str:
    """Precision and engine; another run may have made a cached stage by another engine."""
    has_engine = not is_cached and stage.trains
    return f"{stage.shard.precision} {stage.shard.engine_text}" if has_engine else stage.shard.precision


def _manifest(store: Store, fingerprint: str | None) -> ArtifactManifest | None:
    if fingerprint is None:
        return None
    with contextlib.suppress(TrainwrightError):
        return store.find_artifact(fingerprint)
    return None


def _name_in(record: RunRecord, fingerprint: str | None, name: str) -> str:
    """The name that the stage has in the run that computed it."""
    plan = record.raw["plan"]
    names = {entry["fingerprint"]: entry["name"] for entry in plan}
    return str(names.get(fingerprint, name))


def _builds(manifest: ArtifactManifest | None) -> dict[str, dict[str, Any]]:
    """Build reports of the stage's data, which its metrics carry under `data`."""
    found: Any = None if manifest is None else manifest.metrics.get("data")
    if not isinstance(found, dict):
        return {}
    if "rows_in" in found:
        return {"data": found}
    return {name: build for name, build in found.items() if isinstance(build, dict)}


def _without_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The resolved recipe without empty values, for reading."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None and item not in ({}, [])}
        return value

    return dict(clean(recipe))


def _facts(summary: RunSummary, raw: dict[str, Any], stages: list[StageReport]) -> dict[str, str]:
    facts = {}
    if summary.started_at and summary.updated_at:
        facts["from start to end"] = span(summary.updated_at - summary.started_at)
    cluster = raw["recipe"]["cluster"]
    kind = "GPU" if cluster["gpus_per_worker"] else "CPU"
    facts["workers"] = f"{cluster['workers']} {kind}"
    computed = sum(stage.state == "committed" for stage in stages)
    cached = sum(stage.state == "cached" for stage in stages)
    facts["stages computed" + (f", {cached} cached" if cached else "")] = str(computed)
    for stage in stages:
        if stage.compares_models and stage.manifest:
            metrics = stage.manifest.get("metrics") or {}
            places = {name: place for place, name in enumerate(stage.parents)}
            heads = dict.fromkeys(name.partition(".")[0] for name in metrics if "." in name)
            models = [head for head in heads if head not in (TRUTH, NOISE)]
            facts.update(_headline(metrics, sorted(models, key=lambda name: places.get(name, len(places)))))
    return facts


HEADLINES = {
    "score_gain_sd": "score gain in deviations of the start",
    "perplexity": "held-out perplexity",
    "ngram_perplexity": "that of a counted 5-gram model",
    "chrf": "chrF of held-out targets",
    "bleu": "BLEU of held-out targets",
    "fid": "FID by the classifier's features",
    "coverage": "coverage of real images",
    "kl": "KL to the start, nats per response",
}


def _headline(metrics: dict[str, Any], models: list[str]) -> dict[str, str]:
    """The numbers at the top of the page: those of the models after the first."""
    found: dict[str, str] = {}
    for name, title in HEADLINES.items():
        for model in models[1:] or models:
            value = metrics.get(f"{model}.{name}")
            if isinstance(value, int | float):
                found[f"{title} · {model}"] = f"{value:.3g}"
    return _wins(metrics, models) | found


def _wins(metrics: dict[str, Any], models: list[str]) -> dict[str, str]:
    """Win rates over the start, none without those of the truth and of noise."""
    found: dict[str, str] = {}
    for model in models[1:]:
        for name in metrics:
            term = name.removeprefix(f"{model}.win_rate_")
            if term == name or term.endswith(("_low", "_high")):
                continue
            rates = [(label, metrics.get(f"{label}.win_rate_{term}")) for label in (model, TRUTH, NOISE)]
            shown = ", ".join(f"{label} {rate:.0%}" for label, rate in rates[1:] if rate is not None)
            found[f"wins over the start by {term} ({shown}) · {model}"] = f"{rates[0][1]:.0%}"
    return found
