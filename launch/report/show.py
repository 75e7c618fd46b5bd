"""Plans and results as the rows that the views print."""

from collections.abc import Mapping

from launch.records.stage_result import StageResult
from launch.report.progress import PlanRow, ResultRow
from recipes.planning.plan import Plan


def size(num_bytes: float | None) -> str:
    """Bytes as people write them."""
    if not num_bytes:
        return "-"
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def result_rows(plan: Plan, results: Mapping[str, StageResult], failed: str | None = None) -> list[ResultRow]:
    """The closing table's rows; stages that were not reached are shown as waiting."""
    rows = []
    for planned in plan.stages:
        result = results.get(planned.name)
        if result is None:
            rows.append(
                ResultRow(
                    planned.name,
                    planned.kind,
                    "failed" if planned.name == failed else "waiting",
                    None,
                    "",
                    "",
                    planned.fingerprint,
                )
            )
            continue
        outcome = result.manifest.outcome
        text = outcome.state if outcome.state == "completed" else f"stopped by {outcome.rule}"
        if outcome.steps_planned:
            text += f", {outcome.steps_done:,}/{outcome.steps_planned:,} steps"
        rows.append(
            ResultRow(
                name=result.name,
                kind=result.kind,
                state="cached" if result.cached else "committed",
                seconds=None if result.cached else result.seconds,
                outcome=text,
                gate="passed" if result.manifest.gate.passed else "failed",
                fingerprint=result.manifest.fingerprint,
            )
        )
    return rows


def plan_rows(plan: Plan) -> list[PlanRow]:
    """The plan table's rows."""
    return [
        PlanRow(
            name=stage.name,
            kind=stage.kind,
            inputs=", ".join(dict.fromkeys(item.text for item in stage.inputs.values())),
            workers=str(stage.workers),
            batch=f"{stage.workers} x {stage.micro_batch} x {stage.accumulation}" if stage.micro_batch else "-",
            steps=f"{stage.steps:,}" if stage.steps else "-",
            memory=size(stage.sizes.memory_per_worker_bytes if stage.sizes else None),
            disk=size(stage.sizes.disk_bytes if stage.sizes else None),
            shard=f"{stage.precision} {stage.engine}" if stage.micro_batch else stage.precision,
            state="cached" if stage.cached else "to run",
        )
        for stage in plan.stages
    ]


def plan_notes(plan: Plan) -> list[str]:
    """Notes on inputs, and why precision and engine are what they are where the recipe left it open, by stages."""
    stages: dict[str, list[str]] = {}
    for stage in plan.stages:
        for reason in (*stage.notes, *stage.settled_by.values()):
            stages.setdefault(reason, []).append(stage.name)
    return [f"{reason} ({', '.join(names)})" for reason, names in stages.items()]
