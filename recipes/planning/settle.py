"""What `auto` means in a stage's `shard`: precision, engine and ZeRO stage by hardware, workers and sizes (pure).

It is settled once, where a run starts. From then on plan, jobs, fingerprints and the run's record hold concrete values,
and a resume keeps them wherever it continues. `docs/precision.md` has the measurements behind the rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from recipes.planning.memory import Sizes
from recipes.recipe import Recipe
from recipes.stages.batch import micro_batches
from recipes.stages.kinds import Stage
from recipes.stages.sharding import Shard

PROCESS_BYTES = 500 << 20
"""What a worker's process takes before it holds a model, where it was not measured (`doctor --calibrate`)."""
MEMORY_SHARE = 0.8
"""Share of the memory that a prediction may fill: processes were measured to take up to 1.2 of it (docs/memory.md)."""
UNKNOWN_ZERO = 2
"""ZeRO stage of several workers where nothing is known of the sizes."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What every worker of a recipe runs on, as far as `auto` depends on it."""

    is_gpu: bool = False
    fast_bf16: str = ""
    """What makes bf16 fast there, as `amx_bf16` or `compute capability 9.0`; empty: nothing is known to."""
    lacking: str = ""
    """Why not, where `fast_bf16` is empty."""
    worker_bytes: int | None = None
    """Memory that one worker may take: its GPU's, or its share of its node's. None: not known."""
    process_bytes: int = PROCESS_BYTES
    """What a worker's process takes of its node's memory before it holds a model."""

    def needed(self, sizes: Sizes) -> int:
        """What a worker takes of it."""
        return sizes.memory_per_worker_bytes if self.is_gpu else sizes.cpu_worker_bytes + self.process_bytes


@dataclass(frozen=True, slots=True)
class Settled:
    """A recipe without `auto` in any `shard`; why, by stage and field, where the recipe left it open."""

    recipe: Recipe
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)


SizeOf = Callable[[str, int], Sizes | None]
"""A stage's sizes under (engine, zero)."""


def settle_shards(
    recipe: Recipe, hardware: Hardware, workers: int, predict: Callable[[Recipe], Mapping[str, Sizes | None]]
) -> Settled:
    """Settle every stage's shard; `predict` gives the sizes of a recipe's stages under the engines that it names."""
    reasons: dict[str, dict[str, str]] = {name: {} for name in recipe.stages}
    shards: dict[str, Shard] = {}
    for name, stage in recipe.stages.items():
        shards[name], reason = _settle_precision(stage, hardware)
        reasons[name] |= {"precision": reason} if reason else {}
    settled = _with_shards(recipe, shards)
    known: dict[tuple[str, int], Mapping[str, Sizes | None]] = {}

    def size_of(name: str, engine: str, zero: int) -> Sizes | None:
        if (engine, zero) not in known:
            tried = {other: shard.changed(engine=engine, zero=zero) for other, shard in shards.items()}
            known[engine, zero] = predict(_with_shards(settled, tried))
        return known[engine, zero].get(name)

    for name, stage in settled.stages.items():
        shards[name], reason = _settle_engine(stage, hardware, workers, partial(size_of, name))
        reasons[name] |= {"engine": reason} if reason else {}
    settled = _with_shards(settled, shards)

    def size_with(name: str, micro_batch: int | str) -> Sizes | None:
        tried = {**shards, name: shards[name].changed(micro_batch=micro_batch)}
        return predict(_with_shards(settled, tried)).get(name)

    for name, stage in settled.stages.items():
        shards[name], reason = _settle_micro_batch(stage, hardware, workers, partial(size_with, name))
        reasons[name] |= {"micro_batch": reason} if reason else {}
    return Settled(_with_shards(settled, shards), {name: found for name, found in reasons.items() if found})


def keep_settled(wanted: Recipe, settled: Recipe) -> Recipe:
    """Fill what `wanted` leaves to `auto` with what was settled for the stages of the same name."""
    shards: dict[str, Shard] = {}
    for name, stage in wanted.stages.items():
        if name not in settled.stages:
            continue
        before, found = settled.stages[name].shard, stage.shard
        kept: dict[str, Any] = {"precision": before.precision} if found.precision == "auto" else {}
        if found.engine == "auto" and found.zero == "auto":
            kept |= {"engine": before.engine, "zero": before.zero}
        elif found.engine == "auto":
            kept |= {"engine": "deepspeed"}
        elif found.zero == "auto":
            is_same = before.engine == found.engine
            kept |= {"zero": before.zero if is_same else UNKNOWN_ZERO if found.engine == "deepspeed" else 0}
        if found.micro_batch == "auto" and _divides(stage, before, wanted.cluster.workers):
            kept |= {"micro_batch": before.micro_batch}
        shards[name] = found.changed(**kept)
    return _with_shards(wanted, shards)


def _divides(stage: Stage, before: Shard, workers: int | str) -> bool:
    """Whether the micro-batch that was settled is still a part of each worker's share."""
    batch = stage.batch()
    if before.micro_batch == "auto" or batch is None or not isinstance(workers, int):
        return False
    return batch.divides(workers) and batch.size // workers % before.micro_batch == 0


def _with_shards(recipe: Recipe, shards: Mapping[str, Shard]) -> Recipe:
    stages = {
        name: stage.changed(shard=shards[name]) if name in shards else stage for name, stage in recipe.stages.items()
    }
    return recipe.changed(stages=stages)


def _settle_precision(stage: Stage, hardware: Hardware) -> tuple[Shard, str]:
    if stage.shard.precision != "auto":
        return stage.shard, ""
    if reason := stage.fp32_reason():
        return stage.shard.changed(precision="fp32"), f"fp32: {reason}"
    if not hardware.fast_bf16:
        return stage.shard.changed(precision="fp32"), f"fp32: {hardware.lacking}"
    return stage.shard.changed(precision="bf16"), f"bf16: {hardware.fast_bf16} makes it the faster one"


def _settle_engine(stage: Stage, hardware: Hardware, workers: int, size_of: SizeOf) -> tuple[Shard, str]:
    shard = stage.shard
    if shard.engine == "plain" or not stage.trains:
        return shard.changed(engine="plain", zero=0), ""
    if shard.zero != "auto":
        return shard.changed(engine="deepspeed"), ""
    candidates = _candidates(stage, hardware, workers)
    is_open = shard.engine == "auto"
    if candidates == [("plain", 0)]:
        return shard.changed(engine="plain", zero=0), "plain: one worker has nothing to share out"
    room = None if hardware.worker_bytes is None else hardware.worker_bytes * MEMORY_SHARE
    first: float | None = None
    for engine, zero in candidates:
        sizes = size_of(engine, zero)
        if room is None or sizes is None:
            reason = "its memory is not known" if sizes is None else "the workers' memory is not known"
            return shard.changed(engine="deepspeed", zero=UNKNOWN_ZERO), f"zero {UNKNOWN_ZERO}: {reason}"
        needed = hardware.needed(sizes)
        if needed <= room or (engine, zero) == candidates[-1]:
            said = "every worker has room for the whole state"
            if first is not None:
                before = f"{_text(*candidates[0])} would take {_gib(first)}"
                said = f"{_gib(needed)} of {_gib(room)} GiB; {before} in each worker"
            elif engine != "plain":
                said = f"{_gib(needed)} of {_gib(room)} GiB in each worker"
            return shard.changed(engine=engine, zero=zero), f"{_text(engine, zero)}: {said}" if is_open else ""
        first = needed if first is None else first
    raise AssertionError(f"no engine for {stage.kind}")


def _settle_micro_batch(
    stage: Stage, hardware: Hardware, workers: int, size_of: Callable[[int | str], Sizes | None]
) -> tuple[Shard, str]:
    """The largest micro-batch that fits, where what `auto` takes does not; as it is where none does."""
    shard, batch = stage.shard, stage.batch()
    whole = size_of(shard.micro_batch) if hardware.worker_bytes is not None else None
    if shard.micro_batch != "auto" or batch is None or whole is None or not batch.divides(workers):
        return shard, ""
    room = (hardware.worker_bytes or 0) * MEMORY_SHARE
    largest, accumulation = micro_batches(batch.size, workers, at_most=stage.largest_micro_batch)
    if hardware.needed(whole) <= room:
        return shard, ""
    for micro in range(largest - 1, 0, -1):
        if largest * accumulation % micro:
            continue
        sizes = size_of(micro)
        if sizes is not None and hardware.needed(sizes) <= room:
            said = f"{_gib(hardware.needed(sizes))} of {_gib(room)} GiB in each worker; {largest} would take"
            return shard.changed(micro_batch=micro), f"micro-batch {micro}: {said} {_gib(hardware.needed(whole))}"
    return shard, ""


def _candidates(stage: Stage, hardware: Hardware, workers: int) -> list[tuple[str, int]]:
    """Engines for a stage that leaves its ZeRO stage open, the fastest first; each takes less memory than the last."""
    shard = stage.shard
    sharded = [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
    if hardware.is_gpu or shard.offload == "cpu":
        sharded = sharded[1:]
    sharded = [(engine, zero) for engine, zero in sharded if zero <= stage.largest_zero]
    if shard.engine == "deepspeed" or shard.offload == "cpu":
        return [("deepspeed", 0)] if workers == 1 and shard.offload == "none" else sharded
    if workers == 1:
        return [("plain", 0)]
    return sharded if hardware.is_gpu else [("plain", 0), *sharded]


def _text(engine: str, zero: int) -> str:
    return engine if engine == "plain" else f"zero {zero}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
