"""How many workers an attempt at a stage gets: what the recipe says; fewer after a loss; more when nodes are back."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.silence import STEPPING
from launch.inputs.resolved import Resolved
from recipes.errors import CapacityError
from recipes.planning.plan import PlannedStage
from recipes.stages.kinds import Stage

LOSSES = ("lost", "stall")
"""Verdicts after which there may be fewer nodes."""
SETTLE_S = 3.0
"""Ray takes a moment until what a lost group held counts as free."""
POLL_S = 1.0
GROW_EVERY_S = 15.0


@dataclass(frozen=True)
class Sized:
    """A stage on some number of workers: the recipe that they are given, and its plan."""

    resolved: Resolved
    planned: PlannedStage

    @classmethod
    def of(cls, resolved: Resolved, planned: PlannedStage, workers: int) -> "Sized":
        """The stage on so many workers; its samples, their order and its fingerprint are those of any other number."""
        if workers == planned.workers:
            return cls(resolved, planned)
        recipe = resolved.recipe
        stage = _with_micro_batch(recipe.stages[planned.name], workers)
        cluster = recipe.cluster.changed(workers=workers, min_workers=None)
        changed = recipe.changed(cluster=cluster, stages={**recipe.stages, planned.name: stage})
        return cls(replace(resolved, recipe=changed), replace(planned, workers=workers))


def sizes_of(stage: Stage, least: int, most: int) -> list[int]:
    """The numbers of workers that share the stage's batch evenly, the largest first; `most` is one of them."""
    batch = stage.batch()
    return [size for size in range(most, least - 1, -1) if size == most or batch is None or batch.divides(size)]


def _with_micro_batch(stage: Stage, workers: int) -> Stage:
    """A micro-batch that is part of each worker's share, and no larger than the one before."""
    batch, micro = stage.batch(), stage.shard.micro_batch
    if batch is None or micro == "auto" or batch.size % workers:
        return stage
    return stage.changed(shard=stage.shard.changed(micro_batch=math.gcd(batch.size // workers, micro)))


def wait_for_size(
    sizes: Sequence[int],
    room: Callable[[], int],
    wait_s: float,
    sleep: Callable[[float], object],
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """The first of the sizes as soon as there is room for it; after `wait_s` the largest for which there is.

    Raises `CapacityError` when there is room for none.
    """
    started, told = clock(), False
    while (here := room()) < sizes[0]:
        waited_s = clock() - started
        if waited_s >= max(wait_s, SETTLE_S):
            break
        if waited_s >= SETTLE_S and not told:
            told = True
            tell(f"there is room for {here} of {sizes[0]} workers; waiting up to {wait_s:g} s for another node")
        sleep(POLL_S)
    if told:
        tell("")
    for size in sizes:
        if size <= here:
            return size
    raise CapacityError(
        f"there is room for {here} of {sizes[0]} workers after {wait_s:g} s (cluster.replacement_wait_s); "
        f"at least {sizes[-1]} are needed (cluster.min_workers)"
    )


class Growth:
    """Looks now and then whether a stage that runs on fewer workers could have more."""

    def __init__(self, sizes: Sequence[int], workers: int, room: Callable[[], int]) -> None:
        self._sizes = [size for size in sizes if size > workers]
        self._room = room
        self._looked_at = time.monotonic()
        self.size: int | None = None
        """The number of workers for which there is room now; None: for no more than there are."""

    def is_possible(self, phase: str) -> bool:
        """Whether more workers have room since just now: looked at now and then while it trains."""
        now = time.monotonic()
        if not self._sizes or self.size is not None or phase != STEPPING or now - self._looked_at < GROW_EVERY_S:
            return False
        self._looked_at = now
        here = self._room()
        self.size = next((size for size in self._sizes if size <= here), None)
        return self.size is not None
