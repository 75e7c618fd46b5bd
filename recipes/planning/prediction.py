"""What a stage will take: its sizes, its operations, its time; or why that is not known (pure)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.data.images import ImageSetFacts
from recipes.data.tokenizers import TrainTokenizer
from recipes.models.base import Shape
from recipes.models.images.known_model import KnownImageModel
from recipes.models.images.tally import TextSizes
from recipes.models.known_models import KnownModel
from recipes.models.library import LibraryArchitecture
from recipes.planning.cost import Cost, Flops, Rates, image_flops, stage_seconds, text_flops
from recipes.planning.fingerprint import ParentId
from recipes.planning.memory import Sizes, predict_sizes
from recipes.recipe import Recipe
from recipes.references import Reference, parse_reference
from recipes.rules.chain import autoencoder_of, image_stage_of, origin
from recipes.stages.base import ImageStage, StageBase, TextStage
from recipes.stages.finetune import FinetuneImages
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import Pretrain, PretrainImages
from recipes.stages.rl_images import RlImages

Count = Callable[[Mapping[str, Any]], KnownModel | None]
"""From the keys of a configuration to the sizes of its model; None where there is no such model."""


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
class Known:
    """What predictions are made from."""

    recipe: Recipe
    externals: Mapping[str, Mapping[str, External]]
    images: ImageSetFacts | None = None
    """Size of the stage's images."""
    count: Count = lambda _: None
    """Counts a model that no formula here does."""

    @property
    def on_gpu(self) -> bool:
        """Whether the workers train on GPUs."""
        return self.recipe.cluster.gpus_per_worker == 1


@dataclass(frozen=True, slots=True)
class Predicted:
    """A stage's prediction."""

    stage: StageBase
    workers: int
    sizes: Sizes | None = None
    flops: Callable[[int], Flops] | None = None
    """Operations of so many steps."""
    shape: Shape | None = None
    """Of a language model."""
    unknown: str = ""
    """Why there are no sizes."""

    @property
    def step_flops(self) -> int | None:
        """Operations of an optimiser step; of a whole evaluation; None: not known."""
        if self.flops is None:
            return None
        return self.flops(1).training if self.stage.trains else self.flops(1).total

    def cost(self, steps: int, rates: Rates | None, price: float | None) -> Cost | None:
        """What so many steps take of workers with these rates; `price` is that of a worker's hour."""
        if self.sizes is None or self.flops is None:
            return None
        flops, passes = self.flops(steps), self.stage.passes(steps)
        if rates is None:
            return Cost(flops)
        seconds = stage_seconds(
            flops, self.stage.shard, self.sizes, self.workers, rates, steps, passes, self.shape,
            is_adapted=self.stage.adapters is not None,
        )  # fmt: skip
        return Cost(flops, seconds, None if price is None else price * self.workers * seconds / 3600)


def predict_stage(stage: Stage, known: Known, workers: int, micro_batch: int) -> Predicted:
    """What a stage takes on `workers` workers with micro-batches of so many samples."""
    if isinstance(stage, ImageStage):
        return _predict_images(stage, known, workers, micro_batch)
    return _predict_text(stage, known, workers, micro_batch)


def _predict_text(stage: TextStage, known: Known, workers: int, micro_batch: int) -> Predicted:
    if stage.is_image:
        return Predicted(stage, workers, unknown="evaluations of images are not predicted")
    start = stage.text_start()
    model = _language_model(stage if start is None else origin(start, known.recipe.stages), known)
    if model is None:
        return Predicted(stage, workers, unknown=f"the size of {start or 'its tokenizer'} is not known")
    architecture, vocab_size = model.architecture, model.vocab_size
    sizes = predict_sizes(stage, model, workers, micro_batch, on_gpu=known.on_gpu)
    shape = architecture.shape()
    return Predicted(stage, workers, sizes, lambda steps: text_flops(stage, architecture, vocab_size, steps), shape)


def _predict_images(
    stage: PretrainImages | FinetuneImages | RlImages, known: Known, workers: int, micro_batch: int
) -> Predicted:
    start, facts = image_stage_of(stage, known.recipe.stages), known.images
    if start is None:
        return Predicted(stage, workers, unknown="the size of a diffusion from outside the recipe is not known")
    if facts is None:
        return Predicted(stage, workers, unknown="the images' size shows only when they are read")
    autoencoder = autoencoder_of(start, known.recipe.stages)
    if start.autoencoder is not None and autoencoder is None:
        return Predicted(stage, workers, unknown=f"the size of {start.autoencoder} is not known")
    text: TextSizes | None = None
    if start.text_encoder is not None:
        reader = _language_model(origin(start.text_encoder, known.recipe.stages), known)
        if reader is None:
            return Predicted(stage, workers, unknown=f"the size of {start.text_encoder} is not known")
        count = reader.architecture.num_parameters(reader.vocab_size)
        text = TextSizes(reader.architecture.shape().width, count)
    model = KnownImageModel(start.architecture, facts, autoencoder, text)
    planned = stage.filled_in(start.architecture, is_captioned=text is not None)
    sizes = predict_sizes(planned, model, workers, micro_batch, on_gpu=known.on_gpu)
    return Predicted(planned, workers, sizes, lambda steps: image_flops(planned, model.net, planned.passes(steps)))


def _language_model(source: StageBase | Reference | None, known: Known) -> KnownModel | None:
    """The model that a stage builds, or that a reference to the outside means."""
    recipe, externals = known.recipe, known.externals
    if isinstance(source, Pretrain):
        vocab_size = source.tokenizer.vocab_size if isinstance(source.tokenizer, TrainTokenizer) else None
        if vocab_size is None:
            builder = next(other for other, stage in recipe.stages.items() if stage is source)
            tokenizer = externals.get(builder, {}).get("tokenizer.from")
            vocab_size = tokenizer.vocab_size if tokenizer is not None else None
        if source.architecture is None or vocab_size is None:
            return None
        if isinstance(source.architecture, LibraryArchitecture):
            keys = {"model_type": source.architecture.type, **source.architecture.config_keys()}
            return known.count({**keys, "vocab_size": vocab_size})
        return KnownModel(source.architecture, vocab_size)
    for name, inputs in externals.items():
        for item in recipe.stages[name].inputs():
            if item.field_path in inputs and parse_reference(item.text) == source:
                return inputs[item.field_path].model
    return None
