"""Whether what a run commits fits the store's disk."""

from typing import TYPE_CHECKING

from recipes.errors import CapacityError
from recipes.planning.memory import KEPT_STATES
from recipes.planning.plan import Plan

if TYPE_CHECKING:
    from trainers.store.store import Store

SPARE_BYTES = 64 << 20
"""Room for data sets, journal, metrics and logs besides what the stages commit."""


def check_disk(plan: Plan, store: "Store") -> None:
    """Compare what the plan's stages commit with the store's free space; raises CapacityError."""
    free = store.free_bytes()
    waiting = [stage.sizes for stage in plan.stages if not stage.cached and stage.sizes is not None]
    if free is None or not waiting:
        return
    # Of each stage the newest states stay, until a collection is asked to drop them; one more is being written.
    artifacts = sum(sizes.artifact_bytes for sizes in waiting)
    states = sum(KEPT_STATES * sizes.state_bytes for sizes in waiting)
    states += max(sizes.state_bytes for sizes in waiting)
    needed = artifacts + states + SPARE_BYTES
    if needed > free:
        raise CapacityError(
            f"store {store.uri} has {free / 2**20:,.0f} MiB free; the run needs about {needed / 2**20:,.0f} MiB "
            f"({artifacts / 2**20:,.0f} MiB of artifacts, {states / 2**20:,.0f} MiB of training state, "
            f"{SPARE_BYTES >> 20} MiB for data, logs and reports)"
        )
