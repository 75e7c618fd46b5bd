"""Changes that make a stage fit its workers' memory, found by trying them with the plan's own arithmetic (pure)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from recipes.planning.memory import Sizes
from recipes.stages.batch import micro_batches
from recipes.stages.kinds import Stage
from recipes.stages.lora import Lora

CONTEXT_BYTES = 1 << 30
"""What a process holds of its GPU besides tensors: CUDA's context, cuBLAS's workspaces, NCCL's buffers."""
MOST_TIMES = 64
"""Most times the workers that more of them are tried for."""

Predict = Callable[[Stage, int], Sizes | None]
"""The sizes of a stage on so many workers."""
Fits = Callable[[Sizes, int], bool]
"""Whether so many workers have room."""


@dataclass(frozen=True, slots=True)
class Change:
    """Settings of a stage, and a number of workers."""

    settings: dict[str, Any]
    """By field, relative to the stage."""
    workers: int
    stage: Stage

    def text(self, name: str) -> str:
        """The settings as the command line takes them, for the stage of this name."""
        return " ".join(f"--set stages.{name}.{field}={_yaml(value)}" for field, value in self.settings.items())


def find_change(stage: Stage, workers: int, predict: Predict, fits: Fits) -> Change | None:
    """The first change that makes room, those that cost the least first; None: none of those that are tried."""
    for change in _changes(stage, workers):
        sizes = predict(change.stage, change.workers)
        if sizes is not None and fits(sizes, change.workers):
            return change
    return None


def _changes(stage: Stage, workers: int) -> Iterator[Change]:
    """Single settings, then several at once, then adapters, then more workers."""
    yield from (_changed(stage, workers, micro) for micro in _micro_batches(stage, workers))
    whole: dict[str, Any] = {}
    for settings in _shards(stage, workers):
        yield _changed(stage, workers, settings)
    for settings in [*_shards(stage, workers)][-1:]:
        whole |= settings
    smallest = [*_micro_batches(stage, workers)][-1:]
    if whole and smallest:
        yield _changed(stage, workers, whole | smallest[0])
    if stage.trains and stage.no_checkpointing() is None and not stage.shard.gradient_checkpointing:
        again = {"shard.gradient_checkpointing": True}
        yield _changed(stage, workers, again)
        whole |= again
        yield _changed(stage, workers, whole)
    for micro in smallest:
        whole |= micro
        yield _changed(stage, workers, whole)
    yield from _with_adapters(stage, workers, whole)
    yield from _more_workers(stage, workers, whole)


def _micro_batches(stage: Stage, workers: int) -> Iterator[dict[str, Any]]:
    """Smaller micro-batches, the largest first."""
    batch = stage.batch()
    if batch is None:
        return
    micro, accumulation = micro_batches(batch.size, workers, stage.shard.micro_batch, at_most=stage.largest_micro_batch)
    share = micro * accumulation
    yield from ({"shard.micro_batch": size} for size in range(micro - 1, 0, -1) if share % size == 0)


def _shards(stage: Stage, workers: int) -> Iterator[dict[str, Any]]:
    """Further ZeRO stages."""
    if not stage.trains or workers == 1:
        return
    engine = {} if stage.shard.engine == "deepspeed" else {"shard.engine": "deepspeed"}
    for zero in range(stage.shard.zero_stage + 1, stage.largest_zero + 1):
        yield {**engine, "shard.zero": zero}


def _with_adapters(stage: Stage, workers: int, whole: dict[str, Any]) -> Iterator[Change]:
    """Adapters in place of all parameters, alone and with what else saves memory."""
    if "lora" not in type(stage).model_fields or stage.adapters is not None:
        return
    adapters = {"lora": Lora(r=16, alpha=32)}
    yield _changed(stage, workers, adapters)
    tuned = _changed(stage, workers, adapters).stage
    kept = {
        field: value
        for field, value in whole.items()
        if field != "shard.gradient_checkpointing" or tuned.no_checkpointing() is None
    }
    yield _changed(stage, workers, adapters | kept)


def _more_workers(stage: Stage, workers: int, whole: dict[str, Any]) -> Iterator[Change]:
    """More workers, sharding all there is."""
    batch = stage.batch()
    if batch is None or not stage.trains:
        return
    times = 2
    while times <= MOST_TIMES:
        more = workers * times
        if batch.divides(more):
            shards = [*_shards(stage, more)][-1:]
            settings = {**(shards[0] if shards else {}), **whole}
            settings.pop("shard.micro_batch", None)
            smallest = [*_micro_batches(stage, more)][-1:]
            yield _changed(stage, more, {**settings, **(smallest[0] if smallest else {})})
        times *= 2


def _changed(stage: Stage, workers: int, settings: dict[str, Any]) -> Change:
    shard = {field.removeprefix("shard."): value for field, value in settings.items() if field.startswith("shard.")}
    others = {field: value for field, value in settings.items() if not field.startswith("shard.")}
    return Change(settings, workers, stage.changed(**others, shard=stage.shard.changed(**shard)))


def _yaml(value: Any) -> str:
    if isinstance(value, Lora):
        return f"'{{r: {value.r}, alpha: {value.alpha}}}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
