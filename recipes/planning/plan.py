"""The plan: ordered stages with fingerprints, what is already there, and predicted cost (pure)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recipes.data.images import ImageSetFacts
from recipes.data.text import TrainTokenizer
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.tally import TextSizes
from recipes.models.known_models import KnownModel
from recipes.planning.fingerprint import ParentId, fingerprint
from recipes.planning.image_memory import predict_image_sizes, predict_tuning_sizes
from recipes.planning.memory import Sizes, predict_sizes
from recipes.recipe import Recipe
from recipes.references import Reference, StageRef, parse_reference
from recipes.rules.chain import autoencoder_of, image_stage_of, order, origin
from recipes.stages.base import ImageStage, ImageTraining, StageBase, TextStage
from recipes.stages.batch import micro_batches
from recipes.stages.finetune import FinetuneImages
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import Pretrain, PretrainImages
from recipes.stages.rl import RlImages

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Committed:
    """What the store holds under a fingerprint: its digest, and the digest of each parent by input field."""

    digest: str
    parents: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class External:
    """An input from outside the recipe: what it resolved to and, where known, its size."""

    id: ParentId
    model: KnownModel | None = None
    """A language model, as far as its size is known."""
    vocab_size: int | None = None
    """Of a tokenizer."""
    notes: tuple[str, ...] = ()
    """Notes for the plan."""


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
    settled_by: Mapping[str, str] = field(default_factory=dict)
    """Why precision and engine are what they are, where the recipe left them to `auto`."""
    notes: tuple[str, ...] = ()
    """Notes on the stage's inputs from outside the recipe."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages in the order in which they run."""

    recipe: str
    workers: int
    stages: list[PlannedStage] = field(default_factory=list)

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
) -> Plan:
    """Order the stages and say what each makes and costs.

    `data` holds the digest of each data field by stage, `externals` what inputs from outside the recipe resolved to,
    `find` looks a fingerprint up in the store, `rows` counts a stage's sequences where that is known, `changes` are
    settings that a resume changed while the stage was under way, `images` the size of a stage's images,
    `settled_by` what `auto` was settled by (`settle.py`).
    """
    externals, rows, changes, images = externals or {}, rows or {}, changes or {}, images or {}
    settled_by = settled_by or {}
    plan = Plan(recipe.name, workers)
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
            steps=stage.steps(rows.get(name)),
            precision=stage.shard.precision,
            engine=stage.shard.engine_text,
            settled_by=settled_by.get(name, {}),
            notes=tuple(note for external in externals.get(name, {}).values() for note in external.notes),
            sizes=_image_sizes(stage, recipe, images.get(name), externals, workers, micro or 1)
            if isinstance(stage, ImageStage)
            else _text_sizes(stage, recipe, externals, workers, micro or 1),
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


def _image_sizes(
    stage: PretrainImages | FinetuneImages | RlImages,
    recipe: Recipe,
    facts: ImageSetFacts | None,
    externals: Mapping[str, Mapping[str, External]],
    workers: int,
    micro_batch: int,
) -> Sizes | None:
    """None where the images' size, the start, the autoencoder or the text encoder is not known before the run."""
    start = image_stage_of(stage, recipe.stages)
    if start is None or facts is None:
        return None
    autoencoder = autoencoder_of(start, recipe.stages)
    if start.autoencoder is not None and autoencoder is None:
        return None
    text: TextSizes | None = None
    if start.text_encoder is not None:
        reader = _language_model(origin(start.text_encoder, recipe.stages), recipe, externals)
        if reader is None:
            return None
        count = reader.architecture.num_parameters(reader.vocab_size)
        text = TextSizes(reader.architecture.shape().width, count)
    if isinstance(stage, ImageTraining):
        return predict_image_sizes(stage, start.architecture, facts, autoencoder, text, workers, micro_batch)
    assert isinstance(start.architecture, Ddpm)
    return predict_tuning_sizes(stage, start.architecture, facts, autoencoder, text, workers, micro_batch)


def _text_sizes(
    stage: TextStage,
    recipe: Recipe,
    externals: Mapping[str, Mapping[str, External]],
    workers: int,
    micro_batch: int,
) -> Sizes | None:
    start = stage.text_start()
    known = _language_model(stage if start is None else origin(start, recipe.stages), recipe, externals)
    if known is None:
        return None
    return predict_sizes(
        stage, known.architecture, known.vocab_size, workers, micro_batch, further_parameters=known.further_parameters
    )


def _language_model(
    source: StageBase | Reference | None, recipe: Recipe, externals: Mapping[str, Mapping[str, External]]
) -> KnownModel | None:
    """The model that a stage builds, or that a reference to the outside means."""
    if isinstance(source, Pretrain):
        vocab_size = source.tokenizer.vocab_size if isinstance(source.tokenizer, TrainTokenizer) else None
        if vocab_size is None:
            builder = next(other for other, known in recipe.stages.items() if known is source)
            tokenizer = externals.get(builder, {}).get("tokenizer.from")
            vocab_size = tokenizer.vocab_size if tokenizer is not None else None
        if source.architecture is None or vocab_size is None:
            return None
        return KnownModel(source.architecture, vocab_size)
    for name, inputs in externals.items():
        for item in recipe.stages[name].inputs():
            if item.field_path in inputs and parse_reference(item.text) == source:
                return inputs[item.field_path].model
    return None
