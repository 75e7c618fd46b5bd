"""Reads what the report shows: a run's folder, the artifacts it made, the runs that it took cached stages from."""

import contextlib
import json
from typing import Any

import yaml

from launch.journal import RunSummary
from launch.page import RunReport, StageReport, curves_of
from launch.progress import span
from launch.records import RunRecord, origin_of
from recipes.errors import TrainwrightError
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

STANDARD_REPORT = "report.json"


def collect(record: RunRecord) -> RunReport:
    """Gather a run's report; what cannot be read any more is left out."""
    summary = record.summary()
    raw = record.raw
    resolved = record.resolved()
    stages = []
    for entry in summary.stages:
        inputs = {path: reference.stage for path, reference in resolved.internal[entry.name].items()}
        outside = {path: made.source or made.stage for path, made in resolved.external.get(entry.name, {}).items()}
        manifest = _manifest(record.store, entry.fingerprint) if entry.state in ("committed", "cached") else None
        source = record
        if entry.state == "cached" and entry.fingerprint is not None:
            source = origin_of(record.store, entry.fingerprint, record.run) or record
        stage_name = _name_in(source, entry.fingerprint, entry.name)
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
                builds=_builds(record.store, manifest),
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


def _builds(store: Store, manifest: ArtifactManifest | None) -> dict[str, dict[str, Any]]:
    """Build reports of the data sets, where the artifact's standard report carries them."""
    if manifest is None or STANDARD_REPORT not in manifest.files:
        return {}
    with contextlib.suppress(TrainwrightError, ValueError):
        report = json.loads(store.objects.get_bytes(manifest.files[STANDARD_REPORT].sha256))
        return dict(report.get("data", {}))
    return {}


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
    facts["stages"] = f"{computed} computed, {cached} cached" if cached else f"{computed} computed"
    for stage in stages:
        if stage.kind == "evaluate" and stage.manifest:
            facts.update(_headline(stage.manifest.get("metrics") or {}))
    return facts


HEADLINES = {"win_rate": "win rate against the start", "mean_score": "mean score", "perplexity": "held-out perplexity"}


def _headline(metrics: dict[str, Any]) -> dict[str, str]:
    """The numbers that stand at the top of the page."""
    from launch.page import flatten

    found: dict[str, str] = {}
    for name, value in flatten(metrics).items():
        model, _, metric = name.rpartition(".")
        if metric in HEADLINES and isinstance(value, int | float):
            shown = f"{value:.0%}" if metric == "win_rate" else f"{value:.3g}"
            found[f"{HEADLINES[metric]} · {model}"] = shown
    return found
