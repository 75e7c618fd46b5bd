"""The plan: ordered stages with fingerprints, what is already there, and predicted cost (pure)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recipes.data.images import ImageSetFacts
from recipes.planning.cost import Cost, Rates
from recipes.planning.fingerprint import ParentId, fingerprint
from recipes.planning.memory import Sizes
from recipes.planning.prediction import Count, External, Known, predict_stage
from recipes.recipe import Recipe
from recipes.references import StageRef, parse_reference
from recipes.rules.chain import order
from recipes.stages.batch import micro_batches
from recipes.stages.kinds import Stage

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Committed:
    """What the store holds under a fingerprint: its digest, and the digest of each parent by input field."""

    digest: str
    parents: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One input of a planned stage."""

    text: str
    part: str | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage of the plan; None where a number depends on what is not known yet."""

    name: str
    kind: str
    fingerprint: str
    inputs: dict[str, PlannedInput]
    cached: bool
    digest: str | None
    workers: int
    micro_batch: int | None
    accumulation: int | None
    steps: int | None
    precision: str
    engine: str
    """`plain`, or `zero` with its stage."""
    sizes: Sizes | None = None
    unknown: str = ""
    """Why sizes, operations and time are not known, where they are not."""
    step_flops: int | None = None
    """Operations of a step, or of an evaluation."""
    cost: Cost | None = None
    """None: the number of steps is not known."""
    settled_by: Mapping[str, str] = field(default_factory=dict)
    """Why precision and engine are what they are, where the recipe left them to `auto`."""
    notes: tuple[str, ...] = ()
    """Notes on the stage's inputs from outside the recipe."""


@dataclass(frozen=True, slots=True)
class SourceCount:
    """How much text a source has."""

    field: str
    """Stage and key, as `sft.data.mix.0`."""
    name: str
    """In a mixture; empty outside of one."""
    rows: int
    tokens: int | None
    """By the mean of the first rows, as they are built; None: the tokenizer is yet to be trained."""
    is_whole: bool
    """Whether all rows were counted; else there are more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages in the order in which they run."""

    recipe: str
    workers: int
    stages: list[PlannedStage] = field(default_factory=list)
    rates: str = ""
    """What times are computed from, in words; empty: there are none."""
    misfits: tuple[str, ...] = ()
    """Stages that the workers have no room for, and what would make them fit."""
    sources: tuple[SourceCount, ...] = ()
    """Rows and tokens of the stages' sources of text, where they are known before a run."""

    def to_json(self) -> dict[str, Any]:
        """The stable JSON form."""
        return {"format": FORMAT, **asdict(self)}


def fit_workers(recipe: Recipe, available: int) -> int:
    """The largest number of workers up to `available` that divides every stage's batch; what `workers: auto` means."""
    if recipe.cluster.workers != "auto":
        return recipe.cluster.workers
    fitting = [
        workers
        for workers in range(1, available + 1)
        if all(divides(workers, stage) for stage in recipe.stages.values())
    ]
    return max(fitting, default=1)


def divides(workers: int, stage: Stage) -> bool:
    """Whether the stage's batch can be shared evenly among the workers."""
    batch = stage.batch()
    if batch is None:
        return True
    share = batch.size // workers
    return batch.divides(workers) and (stage.shard.micro_batch == "auto" or share % stage.shard.micro_batch == 0)


def build_plan(
    recipe: Recipe,
    *,
    workers: int,
    data: Mapping[str, Mapping[str, str]],
    externals: Mapping[str, Mapping[str, External]] | None = None,
    find: Callable[[str], Committed | None] = lambda _: None,
    rows: Mapping[str, int] | None = None,
    changes: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    images: Mapping[str, ImageSetFacts] | None = None,
    settled_by: Mapping[str, Mapping[str, str]] | None = None,
    rates: Rates | None = None,
    count: Count = lambda _: None,
) -> Plan:
    """Order the stages and say what each makes and costs.

    `data` holds the digest of each data field by stage, `externals` what inputs from outside the recipe resolved to,
    `find` looks a fingerprint up in the store, `rows` counts a stage's sequences where that is known, `changes` are
    settings that a resume changed while the stage was under way, `images` the size of a stage's images,
    `settled_by` what `auto` was settled by (`settle.py`), `rates` what a worker gets done, `count`
    counts a model that no formula here does.
    """
    externals, rows, changes, images = externals or {}, rows or {}, changes or {}, images or {}
    settled_by = settled_by or {}
    price = recipe.cluster.price_per_gpu_hour if recipe.cluster.gpus_per_worker == 1 else None
    plan = Plan(recipe.name, workers, rates="" if rates is None else rates.source)
    done: dict[str, PlannedStage] = {}
    for name in order(recipe):
        stage = recipe.stages[name]
        parents = _parents(recipe, name, done, externals.get(name, {}))
        made = fingerprint(name, recipe, parents, data.get(name, {}), changes.get(name, ()))
        committed = find(made)
        is_cached = committed is not None and all(
            committed.parents.get(path) == parent.digest != "" for path, parent in parents.items()
        )
        batch = stage.batch()
        micro, accumulation = (
            (None, None)
            if batch is None
            else micro_batches(batch.size, workers, stage.shard.micro_batch, at_most=stage.largest_micro_batch)
        )
        texts = {item.field_path: item.text for item in stage.inputs()}
        known = Known(recipe, externals, images.get(name), count)
        predicted = predict_stage(stage, known, workers, micro or 1)
        steps = stage.steps(rows.get(name))
        done[name] = PlannedStage(
            name=name,
            kind=stage.kind,
            fingerprint=made,
            inputs={
                path: PlannedInput(texts[path], parent.part, parent.fingerprint) for path, parent in parents.items()
            },
            cached=is_cached,
            digest=committed.digest if committed is not None and is_cached else None,
            workers=workers,
            micro_batch=micro,
            accumulation=accumulation,
            steps=steps,
            precision=stage.shard.precision,
            engine=stage.shard.engine_text,
            settled_by=settled_by.get(name, {}),
            notes=tuple(note for external in externals.get(name, {}).values() for note in external.notes),
            sizes=predicted.sizes,
            unknown=predicted.unknown,
            step_flops=predicted.step_flops,
            cost=None if steps is None else predicted.cost(steps, rates, price),
        )
        plan.stages.append(done[name])
    return plan


def _parents(
    recipe: Recipe, name: str, done: Mapping[str, PlannedStage], externals: Mapping[str, External]
) -> dict[str, ParentId]:
    parents: dict[str, ParentId] = {}
    for item in recipe.stages[name].inputs():
        reference = parse_reference(item.text)
        if isinstance(reference, StageRef):
            parent = done[reference.stage]
            part = reference.part or next(iter(recipe.stages[reference.stage].outputs()))
            parents[item.field_path] = ParentId(parent.fingerprint, parent.digest or "", part)
        else:
            parents[item.field_path] = externals[item.field_path].id
    return parents
