"""Training a model of images, from data to candidate; families differ in their module and in what they draw."""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from recipes.models.images.base import VENDI_IMAGES
from recipes.stages.finetune import FinetuneImages
from recipes.stages.pretrain import PretrainImages
from trainers.data.batches import BatchPlan, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.layouts.images import Images, scaled
from trainers.data.order import drawn_rows
from trainers.engine.protocol import Engine
from trainers.evaluation.held_out import evaluate
from trainers.evaluation.image_metrics import vendi_score
from trainers.inference.image_grid import grid_sample
from trainers.models.lora import adapter_tensors
from trainers.models.merged_adapters import merged_tensors
from trainers.objectives.images import ImageObjective
from trainers.runtime import distributed
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.store.manifest import Layout
from trainers.tasks.image_start import (
    ImageStart,
    require_labels,
    require_shape,
    start_training,
    with_caption_tokens,
)
from trainers.training.context import Candidate, StageContext, data_request, open_sets
from trainers.training.image_candidate import write_image_candidate
from trainers.training.moving_average import MovingAverage
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course, run_training

NETWORK = "net."
"""What the names of an adapted network's parameters start with in its family's module."""
ImageSpec = PretrainImages | FinetuneImages


@dataclass(frozen=True)
class ImageData:
    """Images to learn from, and held-out ones where the recipe has any."""

    training: Dataset
    held_out: Dataset | None


@dataclass(frozen=True)
class ImageTask:
    """Training of an image model of any family, from random weights or from another model."""

    spec: ImageSpec
    context: StageContext

    def open_data(self) -> ImageData:
        """Open the images."""
        return ImageData(*open_sets(self.spec, self.context, lambda use: data_request(self.context, use, Images())))

    def build(self, data: ImageData) -> "ImageTrainee":
        """Build or open the family; raises RequestError for images that do not fit it."""
        start = start_training(self.spec, self.context, data.training)
        held_out = None if data.held_out is None else _fitted(data.held_out, start)
        return ImageTrainee(self.spec, self.context, start, held_out)


@dataclass(frozen=True)
class ImageTrainee:
    """An image model on its images."""

    spec: ImageSpec
    context: StageContext
    start: ImageStart
    held_out: Dataset | None

    @property
    def num_rows(self) -> int:
        """Images of an epoch."""
        return self.start.dataset.order(self.context.seed).epoch

    def course(self, training: TrainingPlan[ImageSpec]) -> Course:
        """An engine for each part that the family trains in turn; collective."""
        start, family = self.start, self.start.family
        phases = [
            single_phase(training, part.module, part.objective, name=part.name, lr_ratio=part.lr_ratio)
            for part in family.phases()
        ]
        engines = [phase.engine for phase in phases]
        plan = BatchPlan(start.dataset, self.context.seed, **training.share)
        average = MovingAverage(engines, start.ema_decay, family.averaged)
        source = PlannedBatches(plan, training.steps, average=average)
        measure = ImageEvaluation(self.spec, self.context, start, engines[0], average, self.held_out, training.layout)
        return Course(phases, source, measure)

    def candidate(self, training: TrainingPlan[ImageSpec], course: Course, outcome: Outcome) -> Candidate | None:
        """Write the family as it is kept: averaged where it keeps an average. Collective."""
        start, source = self.start, course.source
        assert isinstance(source, PlannedBatches)
        assert source.average is not None
        adapter = None
        if start.peft_config is not None:  # named as peft's files of the network are
            named = {name.removeprefix(NETWORK): tensor for name, tensor in source.average.weights().items()}
            adapter = adapter_tensors(named)
        metrics = {"evaluation": outcome.evaluation.finite(), "data": start.dataset.report.to_json()}
        return write_image_candidate(
            start.blueprint,
            kept_weights(start, source.average),
            self.context,
            training.checkpoint,
            outcome,
            dtype=dtype_of(self.spec.shard.precision),
            metrics={**outcome.amounts(), **metrics},
            gate_reasons=outcome.evaluation.gate_reasons,
            peft_config=start.peft_config,
            adapter=adapter,
        )


def run_image(spec: ImageSpec, context: StageContext) -> Candidate | None:
    """Train an image model; the candidate comes from rank 0. Collective."""
    return run_training(ImageTask(spec, context))


def kept_weights(start: ImageStart, average: MovingAverage) -> dict[str, Tensor]:
    """Return the weights that are kept, adapters added; collective."""
    found = average.weights()
    return found if start.peft_config is None else merged_tensors(start.family.module, found)


@dataclass(frozen=True)
class ImageEvaluation:
    """Held-out metrics, and a grid of images at fixed seeds for the report."""

    spec: ImageSpec
    context: StageContext
    start: ImageStart
    engine: Engine
    average: MovingAverage
    held_out: Dataset | None
    layout: Layout

    def __call__(self) -> Evaluation:
        """Evaluate; collective."""
        found: dict[str, float] = {}
        if self.held_out is not None:
            rows, layout = self.spec.train.evaluation_rows, self.layout
            batches = evaluation_batches(
                self.held_out, rows, layout.workers, self.context.ranks.rank, layout.micro_batch
            )
            shown = interruptible(batches, self.context.observer, "evaluate", min(rows, len(self.held_out)))
            found = evaluate(self.engine.module, ImageObjective(), shown, self.engine.device)
        if self.spec.train.grid:
            found |= distributed.broadcast_json(self._draw())
        measured = Evaluation(found)
        reasons = self.start.family.gate_reasons(measured.finite(), self.start.dataset)
        return replace(measured, gate_reasons=tuple(reasons))

    def _draw(self) -> dict[str, float]:
        """Draw the grid on rank 0; returns how diverse it is."""
        weights = kept_weights(self.start, self.average)
        if self.context.ranks.rank != 0:
            return {}
        family = self.start.blueprint.with_weights(weights, dtype_of(self.spec.shard.precision))
        if not family.settings.draws:
            return {}
        images = family.grid(self.spec.train.grid, self.context.seed)
        writer = self.context.samples()
        step = self.engine.steps_applied
        columns = len(family.facts.classes) if family.is_conditional else None
        writer.append(grid_sample(images, columns, step))
        writer.flush()
        if len(images) < VENDI_IMAGES or len(self.start.dataset) < len(images):
            return {}
        rows = drawn_rows(self.start.dataset.digest, 0, len(images), len(self.start.dataset))
        real = vendi_score(scaled(self.start.dataset.images_NCHW[np.asarray(rows)]))
        drawn = vendi_score(images.numpy())
        return {"vendi": drawn, "vendi_share": drawn / real}


def _fitted(held_out: Dataset, start: ImageStart) -> Dataset:
    """Number held-out images' labels and tokenize their captions as the training's are."""
    training, architecture = start.dataset, start.blueprint.architecture
    require_shape(held_out, training.shape, "the training images")
    if architecture.label_reader is not None:
        require_labels(held_out, architecture.label_reader)
    return with_caption_tokens(held_out.with_classes(training.classes), start.blueprint.text)
