"""Pretraining and fine-tuning: the same objective, engine and loop on other data."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from recipes.data.text import Mix
from recipes.models.base import TextFamily
from recipes.models.model_kinds import MODEL_KINDS
from recipes.stages.answers import ROLES, Role, SourceUse, TextFacts
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.batches import BatchPlan, evaluation_batches
from trainers.data.dataset import DataLayout, Dataset
from trainers.data.image_processor import ImageProcessor
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.registry import text_layout
from trainers.data.layouts.seq2seq import Seq2Seq
from trainers.data.layouts.stream import Stream
from trainers.data.materialise import DataRequest
from trainers.data.row_forms import row_role
from trainers.data.streams import HeldOutStream, LaneStates, StreamBatches, beginning
from trainers.data.tokenizer import Tokenization
from trainers.engine.protocol import Engine
from trainers.evaluation.held_out import evaluate, per_source, perplexity
from trainers.evaluation.image_text_responses import image_text_response_report
from trainers.evaluation.ngram import ngram_perplexity
from trainers.evaluation.responses import MAX_NEW_TOKENS, open_prompts, response_report
from trainers.evaluation.translation import translate
from trainers.models.families import runtime_of
from trainers.models.grown import learn_only
from trainers.models.load import lacks_head
from trainers.models.lora import add_adapter, fill_adapter, start_names
from trainers.models.protocol import FamilyRuntime
from trainers.models.quantised import decoded_once
from trainers.objectives.protocol import Learning
from trainers.runtime import distributed
from trainers.runtime.observer import Observer, interruptible
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.store.adapters import Weights
from trainers.store.manifest import Layout
from trainers.tasks.language_start import build_stage_model, build_stage_tokenization, stage_family, stage_type
from trainers.tasks.text_classifier import TextClassifierTask
from trainers.training.context import (
    Candidate,
    StageContext,
    data_request,
    model_folder,
    open_sets,
    text_request,
    text_settings,
)
from trainers.training.optimiser_step import BatchSource
from trainers.training.outcome import Evaluate, Evaluation, Outcome
from trainers.training.steps import EVALUATION, PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course, run_training
from trainers.training.text_candidate import TrainedText, write_text_candidate

WRAPPER = "model."
"""Prefix that `TokenLosses` gives to the model's parameter names."""


@dataclass(frozen=True)
class TextData:
    """What a language model learns from, and how it is read."""

    family: TextFamily
    tokenization: Tokenization
    images: ImageProcessor | None
    """Of a vision-language model."""
    training: Dataset
    held_out: Dataset | None

    @property
    def runtime(self) -> FamilyRuntime:
        """The family at run time."""
        return runtime_of(self.family.name)


@dataclass(frozen=True)
class LanguageModelTask:
    """Pretraining or fine-tuning of a language model of any family."""

    spec: Pretrain | Finetune
    context: StageContext

    def open_data(self) -> TextData:
        """Train or take the tokenizer, and open the rows."""
        spec, context = self.spec, self.context
        family = stage_family(spec, context)
        tokenization = build_stage_tokenization(spec, context)
        images = (
            None if spec.init_from is None else runtime_of(family.name).open_images(model_folder(context, "init_from"))
        )
        if images is not None:
            images = images.kept_in(spec.shard.precision)
        image_tokens = None if images is None else images.tokens_per_image
        spec.check_model(TextFacts(family, tokenization.facts.special_tokens, image_tokens=image_tokens))
        training, held_out = open_sets(
            spec, context, lambda use: training_request(spec, family, use, context, tokenization, images)
        )
        return TextData(family, tokenization, images, training, held_out)

    def build(self, data: TextData) -> "LanguageTrainee":
        """Build the model from random weights or load it, with an adapter where one is trained."""
        spec, context = self.spec, self.context
        model, weights = build_stage_model(spec, context, data.tokenization)
        peft_config = choose_trained(spec, context, model, data, weights) if isinstance(spec, Finetune) else None
        learning = data.runtime.learning(spec, model, data.tokenization, context.seed)
        return LanguageTrainee(spec, context, data, model, learning, peft_config, weights)


@dataclass(frozen=True)
class LanguageTrainee:
    """A language model on its rows."""

    spec: Pretrain | Finetune
    context: StageContext
    data: TextData
    model: Any
    learning: Learning
    peft_config: Any
    weights: Weights | None
    """What the model was opened from; None: it was built."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.data.training.order(self.context.seed).epoch

    def course(self, training: TrainingPlan[Pretrain | Finetune]) -> Course:
        """One engine; held-out rows are measured where there are any. Collective."""
        data, learning = self.data, self.learning
        phase = single_phase(training, learning.module, learning.objective)
        evaluate_held_out = None
        if data.held_out is not None:
            evaluate_held_out = held_out_loss(
                phase.engine,
                learning,
                data.training,
                data.held_out,
                self.spec,
                training.layout,
                data.tokenization,
                self.context.observer,
            )
        source = batch_source(training, data, self.model, learning)
        return Course([phase], source, evaluate_held_out)

    def candidate(
        self, training: TrainingPlan[Pretrain | Finetune], course: Course, outcome: Outcome
    ) -> Candidate | None:
        """Ask a tuned model held-out prompts, then write it; collective."""
        spec, data, (phase,) = self.spec, self.data, course.phases
        trained = TrainedText(
            data.runtime.kind,
            self.model,
            WRAPPER,
            data.tokenization,
            dtype_of(spec.shard.precision),
            self.peft_config,
            merge=spec.commits_merged,
            images=data.images,
            stack=() if self.weights is None else self.weights.stack,
            continues=self.weights is not None and self.weights.continued is not None,
        )
        metrics = stage_metrics(outcome, data.training)
        if isinstance(spec, Finetune):
            responses = held_out_responses(spec, self.context, phase.engine, trained, data.held_out)
            metrics |= {} if responses is None else {"responses": responses}
        if self._has_new_head():
            metrics["new_head"] = "the start has none; drawn from the seed"
        return write_text_candidate(
            trained,
            self.context,
            phase.engine,
            training.checkpoint,
            outcome,
            artifact="model" if self.peft_config is None else "adapter",
            metrics={**metrics, **outcome.evaluation.tables},
        )

    def _has_new_head(self) -> bool:
        is_masked = MODEL_KINDS[self.data.runtime.kind].fills_masks
        return self.spec.init_from is not None and is_masked and lacks_head(model_folder(self.context, "init_from"))


def run_language_model(spec: Pretrain | Finetune, context: StageContext) -> Candidate | None:
    """Train a text model of any family; the candidate comes from rank 0. Collective."""
    family = stage_family(spec, context)
    spec.check_model(TextFacts(family, type=stage_type(spec, context)))
    if isinstance(spec, Finetune) and spec.is_classifier(family):
        return run_training(TextClassifierTask(spec, context))
    return run_training(LanguageModelTask(spec, context))


def batch_source(
    training: TrainingPlan[Pretrain | Finetune], data: TextData, model: Any, learning: Learning
) -> BatchSource:
    """Return the stage's batches; a stream is read in lanes that carry a recurrent model's states on its device."""
    settings, seed, dataset = training.spec.train, training.context.seed, data.training
    if dataset.layout is not Stream:
        plan = BatchPlan(dataset, seed, **training.share, by_length=not data.family.is_packed)
        return PlannedBatches(plan, training.steps, learning.prepare)
    return StreamBatches(
        dataset,
        LaneStates(model.base_model.zero_state(settings.global_batch).detach()),
        seed=seed,
        sequence_length=settings.sequence_length,
        steps_planned=training.steps,
        **training.share,
    )


def choose_trained(
    spec: Finetune, context: StageContext, model: nn.Module, data: TextData, weights: Weights | None
) -> Any:
    """Freeze what does not learn; returns peft's configuration of the adapter over those of the start, or None."""
    exclude = data.runtime.freeze(spec, model, data.images)
    if spec.lora is None:
        if spec.trainable:
            learn_only(model, spec.trainable)
        return None
    on = () if weights is None else start_names(len(weights.adapters))
    config = add_adapter(model, spec.lora, seed=stream_seed(context.seed, "adapter"), exclude=exclude, on=on)
    if weights is not None and weights.continued is not None:
        fill_adapter(model, weights.continued)
    return config


def training_request(
    spec: Pretrain | Finetune,
    family: TextFamily,
    use: SourceUse,
    context: StageContext,
    tokenization: Tokenization,
    images: ImageProcessor | None = None,
) -> DataRequest:
    """Say which set the stage needs of its training or held-out rows."""
    role = family.tuning_role if ROLES[spec.data_role].is_tuning else row_role(use)
    template_role = cast(Role, role) if ROLES[role].has_targets else use.role
    settings = replace(
        text_settings(template_role, tokenization, spec.train.sequence_length, spec.own_template),
        packing=spec.train.packing and family.is_packed,
        loss_on=spec.counted_tokens,
    )
    layout: DataLayout
    if images is not None:
        layout = ImageText(settings, images)
    elif family.is_recurrent and ROLES[spec.data_role].is_plain:
        weighed = isinstance(use.source, Mix) and use.source.has_weights and not use.held_out
        layout = Stream(settings, cast(Mix, use.source) if weighed else None)
    else:
        layout = text_layout(role, settings)
    return data_request(context, use, layout)


def held_out_loss(
    engine: Engine,
    learning: Learning,
    training_set: Dataset,
    dataset: Dataset,
    spec: Pretrain | Finetune,
    layout: Layout,
    tokenization: Tokenization,
    observer: Observer,
) -> Evaluate:
    """Return the evaluation of the stage: mean loss and perplexity over held-out rows, and a counted model's.

    What a fine-tuned encoder-decoder writes is scored and becomes the table `translations`. Counts here. Collective.
    """
    rows, length = spec.train.evaluation_rows, spec.train.sequence_length
    is_stream = dataset.layout is Stream
    if is_stream:
        dataset = beginning(dataset, rows, length)
    baseline = math.nan
    if learning.predicts_next:
        observer.phase("ngram")
        counted_rows = None if is_stream else rows
        baseline = ngram_perplexity([training_set], dataset, counted_rows, tokenization.vocab_size)
    count = min(rows, len(dataset))

    def reasons(means: Mapping[str, float]) -> tuple[str, ...]:
        return gate_reasons(means.get("loss"), tokenization.vocab_size)

    def measured(own: range, count: int) -> dict[str, float]:
        place = (layout.workers, distributed.rank(), layout.micro_batch)
        batches = (learning.prepare(batch, EVALUATION) for batch in evaluation_batches(dataset, count, *place, own))
        return evaluate(engine.module, learning.objective, batches, engine.device)

    def run() -> Evaluation:
        share = (dataset, rows, layout.workers, distributed.rank(), layout.micro_batch)
        prepared: Iterable[Any]
        if is_stream:
            model: Any = learning.module
            zero_state = model.model.base_model.zero_state
            prepared = HeldOutStream(
                dataset, zero_state, length=length, workers=layout.workers, rank=distributed.rank()
            )
        else:
            prepared = (learning.prepare(batch, EVALUATION) for batch in evaluation_batches(*share))
        shown = interruptible(prepared, observer, "evaluate", count)
        means = evaluate(engine.module, learning.objective, shown, engine.device)
        means |= per_source(dataset, rows, measured, ("loss",))
        if dataset.layout is Seq2Seq and isinstance(spec, Finetune):
            search = {"num_beams": spec.num_beams, "max_new_tokens": spec.train.sequence_length}
            with engine.gathered() as bare:
                asked = interruptible(evaluation_batches(*share), observer, "targets", count)
                written = translate(bare.model, dataset, asked, tokenization, **search)
            return Evaluation({**means, **written.scores()}, {"translations": written.report()}, reasons(means))
        if "loss" in means and learning.predicts_next:
            means |= {"perplexity": perplexity(means["loss"]), "ngram_perplexity": baseline}
        return Evaluation(means, gate_reasons=reasons(means))

    return run


def held_out_responses(
    spec: Finetune, context: StageContext, engine: Engine, trained: TrainedText, evaluation_set: Dataset | None
) -> dict[str, Any] | None:
    """Report how a tuned model answers held-out prompts, on rank 0; None where there are none. Collective."""
    with engine.gathered():
        if context.ranks.rank != 0:
            return None
        facts = MODEL_KINDS[trained.kind]
        if facts.continues and not facts.reads_images:
            with decoded_once(trained.model):
                return _text_responses(spec, context, trained)
        if facts.reads_images and evaluation_set is not None and spec.loss_on == "responses":
            return image_text_response_report(trained.model, evaluation_set, trained.tokenization)
    return None


def _text_responses(spec: Finetune, context: StageContext, trained: TrainedText) -> dict[str, Any] | None:
    held_out = spec.find_source("evaluation")
    if held_out is None:
        return None
    half = spec.train.sequence_length // 2
    asked = replace(held_out, role="prompts")
    request = text_request(context, asked, trained.tokenization, half, spec.template)
    prompts = open_prompts(request, context.store)
    if prompts is None:
        return None
    new_tokens = min(half, MAX_NEW_TOKENS)
    return response_report(trained.model, prompts, trained.tokenization, max_new_tokens=new_tokens)


def stage_metrics(outcome: Outcome, dataset: Dataset) -> dict[str, Any]:
    """Return the stage's standard report: losses, amounts, what became of the data's rows; no durations."""
    return {
        **outcome.amounts(),
        "evaluation": outcome.evaluation.finite(),
        "target_tokens": int(outcome.weight),
        "data": dataset.report.to_json(),
        "training_set": dataset.digest,
    }


def gate_reasons(loss: float | None, vocab_size: int) -> tuple[str, ...]:
    """Return why later stages should not build on the model: held-out loss no better than guessing."""
    if loss is not None and not loss < math.log(vocab_size):
        return (f"held-out loss {loss:.3f} is not below that of a uniform guess, {math.log(vocab_size):.3f}",)
    return ()
