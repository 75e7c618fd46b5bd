"""What a plan's stages take, as a table: memory of a worker by part, operations, time, price."""

from collections.abc import Iterator

from rich.table import Table

from launch.report.progress import span
from launch.report.show import size
from recipes.planning.plan import Plan, PlannedStage

PARTS = ("weights", "gradients", "optimizer", "averages", "buffers", "activations", "logits", "cache", "loading")
"""Parts of a worker's memory, as `Memory` names them."""
_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def takes_table(plan: Plan) -> Table:
    """A row for each stage; parts that no stage has are left out."""
    shown = [part for part in PARTS if any(stage.sizes and getattr(stage.sizes.memory, part) for stage in plan.stages)]
    title = "what the stages take"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    priced = any(stage.cost and stage.cost.price is not None for stage in plan.stages)
    for head in (
        "stage",
        "parameters",
        *shown,
        "together",
        "artifact",
        "a state",
        "FLOPs",
        "time",
        *(["price"] if priced else []),
    ):
        table.add_column(head, justify="left" if head == "stage" else "right", header_style="dim")
    for stage in plan.stages:
        memory = [size(getattr(stage.sizes.memory, part)) if stage.sizes else "-" for part in shown]
        whole = size(stage.sizes.memory_per_worker_bytes) if stage.sizes else "-"
        count = "-" if stage.sizes is None else si(stage.sizes.parameters)
        price = [] if not priced else [_price(stage)]
        disk = [size(found) for found in _disk(stage)]
        table.add_row(stage.name, count, *memory, whole, *disk, _flops(stage), _time(stage), *price)
    return table


def takes_notes(plan: Plan) -> Iterator[str]:
    """Why a stage has no figures, what times and prices are computed from, and what there is besides the workers."""
    for stage in plan.stages:
        if stage.unknown:
            yield f"{stage.name}: no figures: {stage.unknown}"
        elif stage.steps is None:
            yield f"{stage.name}: no time: its epochs are counted when its rows are; FLOPs are those of a step"
    for source in plan.sources:
        name = f" ({source.name})" if source.name else ""
        rows = f"{source.rows:,} rows" if source.is_whole else f"more than {source.rows:,} rows"
        tokens = "" if source.tokens is None else f", about {si(source.tokens)}tokens"
        yield f"{source.field}{name}: {rows}{tokens}"
    host = max((stage.sizes.host_bytes for stage in plan.stages if stage.sizes), default=0)
    if host:
        yield f"memory of the host: up to {size(host)} for each worker, while it reads its model"
    yield (
        f"time: {plan.rates}"
        if plan.rates
        else "time: not known: `trainwright doctor --calibrate` measures this machine"
    )
    done = [stage.cost for stage in plan.stages if stage.cost and not stage.cached]
    seconds = sum(cost.seconds or 0.0 for cost in done)
    if seconds:
        prices = [cost.price for cost in done if cost.price is not None]
        said = f", {sum(prices):,.2f} at the recipe's price" if prices else ""
        yield f"together: {si(sum(cost.flops.total for cost in done))}FLOPs in {span(seconds)} of arithmetic{said}"


def si(value: float) -> str:
    """A number with three digits and the unit's prefix."""
    power = 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or power == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[power]}"


def _disk(stage: PlannedStage) -> tuple[int | None, int | None]:
    """Bytes of what it makes, and of a saved state."""
    return (None, None) if stage.sizes is None else (stage.sizes.artifact_bytes, stage.sizes.state_bytes)


def _flops(stage: PlannedStage) -> str:
    if stage.cost is not None:
        return si(stage.cost.flops.total)
    return "-" if stage.step_flops is None else f"{si(stage.step_flops)} a step"


def _time(stage: PlannedStage) -> str:
    return "-" if stage.cost is None or stage.cost.seconds is None else span(stage.cost.seconds)


def _price(stage: PlannedStage) -> str:
    return "-" if stage.cost is None or stage.cost.price is None else f"{stage.cost.price:,.2f}"
