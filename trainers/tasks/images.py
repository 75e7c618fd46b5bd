"""Training a model of images, from data to candidate; families differ in their module and in what they draw."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.models.images.base import VENDI_IMAGES
from recipes.stages.finetune import FinetuneImages
from recipes.stages.pretrain import PretrainImages
from trainers.checkpoint.loop_state import SourceState
from trainers.data.batches import BatchPlan, evaluation_batches
from trainers.data.materialise_images import ImageDataset, ImageRequest
from trainers.data.order import drawn_rows
from trainers.engine.protocol import Engine
from trainers.evaluation.held_out import evaluate
from trainers.evaluation.image_metrics import vendi_score
from trainers.inference.image_grid import grid_sample
from trainers.models.images.protocol import Drawing
from trainers.models.lora import adapter_tensors, merged_tensors
from trainers.objectives.images import ImageObjective
from trainers.runtime import distributed
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.store.manifest import Layout
from trainers.tasks.image_start import (
    ImageStart,
    require_labels,
    require_shape,
    start_training,
    with_caption_tokens,
)
from trainers.training.context import Candidate, StageContext, open_images
from trainers.training.image_candidate import write_image_candidate
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import TrainingPlan, single_phase
from trainers.training.task import Course, run_training

NETWORK = "net."
"""What the names of an adapted network's parameters start with in its family's module."""
ImageSpec = PretrainImages | FinetuneImages


@dataclass(frozen=True)
class ImageData:
    """Images to learn from, and held-out ones where the recipe has any."""

    training: ImageDataset
    held_out: ImageDataset | None


@dataclass(frozen=True)
class ImageTask:
    """Training of an image model of any family, from random weights or from another model."""

    spec: ImageSpec
    context: StageContext

    def open_data(self) -> ImageData:
        """Open the images."""
        training = open_images(self.context, _request(self.spec, self.context))
        return ImageData(training, _held_out_set(self.spec, self.context))

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
    held_out: ImageDataset | None

    @property
    def num_rows(self) -> int:
        """Images of an epoch."""
        return len(self.start.dataset)

    def course(self, training: TrainingPlan[ImageSpec]) -> Course:
        """An engine for each part that the family trains in turn; collective."""
        start, family = self.start, self.start.family
        phases = [
            single_phase(training, part.module, ImageObjective(part.loss_name), name=part.name, lr_ratio=part.lr_ratio)
            for part in family.phases()
        ]
        engines = [phase.engine for phase in phases]
        plan = BatchPlan(start.dataset, self.context.seed, **training.share)
        adapted = None if start.peft_config is None else family.module
        source = ImageBatches(plan, training.steps, engines, start.ema_decay, family.averaged, adapted)
        measure = ImageEvaluation(self.spec, self.context, start, engines[0], source, self.held_out, training.layout)
        return Course(phases, source, measure)

    def candidate(self, training: TrainingPlan[ImageSpec], course: Course, outcome: Outcome) -> Candidate | None:
        """Write the family as it is kept: averaged where it keeps an average. Collective."""
        start, source = self.start, course.source
        assert isinstance(source, ImageBatches)
        metrics = {"evaluation": outcome.evaluation.finite(), "data": start.dataset.report.to_json()}
        return write_image_candidate(
            start.blueprint,
            source.weights(),
            self.context,
            training.checkpoint,
            outcome,
            dtype=dtype_of(self.spec.shard.precision),
            metrics={**outcome.amounts(), **metrics},
            gate_reasons=outcome.evaluation.gate_reasons,
            peft_config=start.peft_config,
            adapter=None if start.peft_config is None else source.adapter_weights(),
        )


def run_image(spec: ImageSpec, context: StageContext) -> Candidate | None:
    """Train an image model; the candidate comes from rank 0. Collective."""
    return run_training(ImageTask(spec, context))


@dataclass
class ImageBatches:
    """Batch source over a materialised set; with `ema_decay` it also keeps the moving average of the weights.

    The average starts at the weights after the first step, with a decay that rises to its value: (1 + n) / (10 + n).
    """

    plan: BatchPlan
    steps_planned: int
    engines: Sequence[Engine]
    ema_decay: float | None
    averaged: str = ""
    """What the names of averaged parameters start with."""
    adapted: nn.Module | None = None
    """The family's module where adapters are trained."""
    _ema: dict[str, Tensor] = field(default_factory=dict)

    def micro_batches(self, step: int) -> list[Any]:
        """Return this rank's share of the step's rows."""
        return list(self.plan.micro_batches(step))

    def can_save(self, steps_done: int) -> bool:
        """Always: rows are a pure function of the step."""
        return True

    @torch.no_grad()
    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Move the average; never stops early."""
        if self.ema_decay is None:
            return None
        decay = min(self.ema_decay, (1 + steps_done) / (10 + steps_done))
        for name, tensor in self._parameters():
            if not name.startswith(self.averaged):
                continue
            if name in self._ema:
                self._ema[name].lerp_(tensor.float(), 1 - decay)
            else:
                self._ema[name] = tensor.float().clone()
        return None

    def state(self) -> SourceState:
        """The average."""
        return SourceState(tensors=dict(self._ema))

    def load_state(self, state: SourceState) -> None:
        """Take over a saved average."""
        self._ema = dict(state.tensors)

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters that are kept: the average where there is one, adapters added; collective."""
        found = {name: tensor.clone() for name, tensor in self._parameters()} | self._ema
        return found if self.adapted is None else merged_tensors(self.adapted, found)

    def adapter_weights(self) -> dict[str, Tensor]:
        """Return the adapters alone, named as peft's files of the network do; collective."""
        found = {name.removeprefix(NETWORK): tensor.clone() for name, tensor in self._parameters()}
        return adapter_tensors(found)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for engine in self.engines:
            yield from engine.full_parameters()


@dataclass(frozen=True)
class ImageEvaluation:
    """Held-out metrics, and a grid of images at fixed seeds for the report."""

    spec: ImageSpec
    context: StageContext
    start: ImageStart
    engine: Engine
    source: ImageBatches
    held_out: ImageDataset | None
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
        weights = self.source.weights()
        if self.context.ranks.rank != 0:
            return {}
        family = self.start.blueprint.with_weights(weights, dtype_of(self.spec.shard.precision))
        if not isinstance(family, Drawing):
            return {}
        images = draw_grid(family, self.spec.train.grid, self.context.seed)
        writer = self.context.samples()
        step = self.engine.steps_applied
        columns = len(family.facts.classes) if family.is_conditional else None
        writer.append(grid_sample(images, columns, step))
        writer.flush()
        if len(images) < VENDI_IMAGES or len(self.start.dataset) < len(images):
            return {}
        rows = drawn_rows(self.start.dataset.digest, 0, len(images), len(self.start.dataset))
        real = vendi_score(self.start.dataset.images_NCHW[np.asarray(rows)].astype(np.float32) / 255)
        drawn = vendi_score(images.numpy())
        return {"vendi": drawn, "vendi_share": drawn / real}


def draw_grid(family: Drawing, count: int, seed: int) -> Tensor:
    """Draw images at fixed seeds; where the family knows classes or captions, each in turn."""
    classes = len(family.facts.classes)
    labels = [number % classes for number in range(count)] if family.is_conditional else None
    return family.sample([stream_seed(seed, "grid", number) for number in range(count)], labels)


def _request(spec: ImageSpec, context: StageContext) -> ImageRequest:
    return ImageRequest(spec.data, context.base_dir, context.seed, source_digest=context.data.get("data"))


def _held_out_set(spec: ImageSpec, context: StageContext) -> ImageDataset | None:
    """Open the held-out images; None: there are none. Collective."""
    use = spec.find_source("evaluation")
    if use is None:
        return None
    request = ImageRequest(
        use.images,
        context.base_dir,
        context.seed,
        held_out=use.held_out,
        source_digest=context.data.get("evaluation"),
    )
    return open_images(context, request)


def _fitted(held_out: ImageDataset, start: ImageStart) -> ImageDataset:
    """Number held-out images' labels and tokenize their captions as the training's are."""
    training, architecture = start.dataset, start.blueprint.architecture
    require_shape(held_out, training.shape, "the training images")
    if architecture.label_reader is not None:
        require_labels(held_out, architecture.label_reader)
    return with_caption_tokens(held_out.with_classes(training.classes), start.blueprint.text)
