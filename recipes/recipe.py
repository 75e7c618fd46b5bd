"""The whole recipe."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from recipes.fields import Strict, Whole, meaning, placement
from recipes.stages.kinds import Stage

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]


class Cluster(Strict):
    """What the run asks of the cluster."""

    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=10**5)] = placement(
        "auto",
        description="Workers per stage; auto: one per GPU, else one per core up to 2; resolved where it runs.",
    )
    min_workers: int | None = placement(
        None,
        ge=1,
        le=10**5,
        description="Fewest workers that `workers: auto` may settle on, and that a stage continues with after a loss; "
        "null: 1 for `auto`, and no fewer after a loss than it started with.",
    )
    replacement_wait_s: int = placement(
        300,
        ge=0,
        le=86_400,
        description="Seconds to wait after a loss for other nodes, before the stage continues on fewer workers.",
    )
    gpus_per_worker: Annotated[Literal["auto", 0, 1], Whole] = placement(
        "auto", description="1 for GPU workers, 0 for CPU workers; auto: 1 where the cluster has GPUs."
    )
    price_per_gpu_hour: float | None = placement(
        None, gt=0, le=10**6, description="Price of an hour of one GPU, in any currency: `plan` tells what stages cost."
    )
    placement_timeout_s: int = placement(
        300, ge=1, le=86_400, description="Seconds to wait for busy resources before giving up."
    )
    stall_after_s: int = placement(
        30,
        ge=5,
        le=86_400,
        description="Seconds without progress after which training counts as stalled, or 10 of its usual steps if "
        "that is longer; also for a worker that was stopped or does not answer.",
    )
    max_retries: int = placement(
        2, ge=0, le=100, description="Further attempts at a stage after an infrastructure failure."
    )


class Recipe(Strict):
    """A chain of stages and what it needs."""

    name: Name = placement(description="Name of the recipe; part of run ids.")
    seed: int = meaning(0, ge=0, lt=2**63, description="Seed of every stage that does not set its own.")
    cluster: Cluster = placement(default_factory=Cluster, description="Workers, placement and retries.")
    stages: dict[Name, Stage] = meaning(
        min_length=1, max_length=256, description="The chain; order follows from the references."
    )
