"""Fine-tuning of an encoder to a classifier of texts, full or with adapters, maybe beside rows without a label."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recipes.errors import RequestError
from recipes.models.encoder import Corruption
from recipes.stages.answers import SourceUse
from recipes.stages.finetune import Finetune
from trainers.data.batches import LabelledBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.labelled_batches import LabelledPlan, labelled_rows, split_by_label
from trainers.data.masking import Masker
from trainers.data.materialise import DataRequest
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.engine.protocol import Engine
from trainers.evaluation.class_metrics import Predictions
from trainers.evaluation.held_out import per_source
from trainers.models.grown import learn_only
from trainers.models.load import classifier_parts, load_model
from trainers.models.lora import add_adapter
from trainers.objectives.classification import ClassificationObjective, ClassLosses
from trainers.runtime import distributed
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.training.context import Candidate, StageContext, model_folder, open_sets, text_request
from trainers.training.outcome import Evaluate, Evaluation, Outcome
from trainers.training.steps import PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course
from trainers.training.text_candidate import TrainedText, write_text_candidate

WRAPPER = "model."
"""Prefix that `ClassLosses` gives to the model's parameter names."""


@dataclass(frozen=True)
class LabelledData:
    """Texts with classes, maybe beside texts without."""

    tokenization: Tokenization
    rows: Dataset
    labelled: np.ndarray
    """Numbers of the rows with a label."""
    unlabelled: np.ndarray
    held_out: Dataset | None
    """With the classes numbered as `rows` does."""


@dataclass(frozen=True)
class TextClassifierTask:
    """Fine-tuning of an encoder to a classifier."""

    spec: Finetune
    context: StageContext

    def open_data(self) -> LabelledData:
        """Open the rows and tell those with a label from the others."""
        spec, context = self.spec, self.context
        tokenization = load_tokenization(model_folder(context, "init_from"))

        def request(use: SourceUse) -> DataRequest:
            return text_request(context, replace(use, role="labels"), tokenization, spec.train.sequence_length)

        rows, held_out = open_sets(spec, context, request)
        labelled, unlabelled = split_by_label(rows, spec.labelled_share)
        if held_out is not None:
            held_out = held_out.with_classes(rows.classes)
        return LabelledData(tokenization, rows, labelled, unlabelled, held_out)

    def build(self, data: LabelledData) -> "TextClassifierTrainee":
        """Load the encoder with a new head for the classes."""
        model, peft_config = _build_model(self.spec, self.context, data.rows.classes)
        return TextClassifierTrainee(self.spec, self.context, data, model, peft_config)


@dataclass(frozen=True)
class TextClassifierTrainee:
    """An encoder with a head, on its texts."""

    spec: Finetune
    context: StageContext
    data: LabelledData
    model: Any
    peft_config: Any

    @property
    def num_rows(self) -> int:
        """Rows with a label, of which an epoch is made."""
        return self.data.rows.order(self.context.seed, self.data.labelled).epoch

    def course(self, training: TrainingPlan[Finetune]) -> Course:
        """One engine; unlabelled rows learn by pseudo-labels where the recipe says so. Collective."""
        spec, data, seed = self.spec, self.data, self.context.seed
        pseudo = spec.pseudo_labels
        phase = single_phase(training, ClassLosses(self.model, pseudo), ClassificationObjective(pseudo))
        masker = None if pseudo is None else Masker(Corruption(share=pseudo.hidden_share), data.tokenization, seed)
        plan = LabelledPlan(data.rows, data.labelled, data.unlabelled, pseudo, masker, seed=seed, **training.share)
        evaluate = None if data.held_out is None else _evaluation(phase.engine, data.held_out, spec, training)
        return Course([phase], PlannedBatches(plan, training.steps), evaluate)

    def candidate(self, training: TrainingPlan[Finetune], course: Course, outcome: Outcome) -> Candidate | None:
        """Write the classifier; collective."""
        data, dtype = self.data, dtype_of(self.spec.shard.precision)
        return write_text_candidate(
            TrainedText(
                "text_classifier",
                self.model,
                WRAPPER,
                data.tokenization,
                dtype,
                self.peft_config,
                classifier_parts(self.model),
            ),
            self.context,
            course.phases[0].engine,
            training.checkpoint,
            outcome,
            artifact="text_classifier",
            metrics={
                **outcome.amounts(),
                "evaluation": {**outcome.evaluation.finite(), **outcome.evaluation.tables},
                "rows": {"labelled": len(data.labelled), "unlabelled": len(data.unlabelled)},
                "data": data.rows.report.to_json(),
            },
        )


def _build_model(spec: Finetune, context: StageContext, classes: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the encoder with a head for the classes, and peft's configuration where an adapter learns beside it."""
    model = load_model(
        model_folder(context, "init_from"),
        "text_classifier",
        device=context.ranks.device,
        new_head_seed=stream_seed(context.seed, "head"),
        classes=classes,
        dropout=spec.dropout,
    )
    if spec.lora is None:
        if spec.trainable:
            learn_only(model, spec.trainable)
        return model, None
    parts = classifier_parts(model)
    excluded = [f"{part.rsplit('.', 1)[-1]}.dense" for part in parts if "." in part]
    seed = stream_seed(context.seed, "adapter")
    return model, add_adapter(model, spec.lora, seed=seed, exclude=excluded, heads=parts)


def _evaluation(engine: Engine, dataset: Dataset, spec: Finetune, training: TrainingPlan[Finetune]) -> Evaluate:
    """Return the evaluation of the stage; collective."""

    def run() -> Evaluation:
        rank, layout, rows_planned = distributed.rank(), training.layout, spec.train.evaluation_rows
        known = labelled_rows(dataset)
        read = evaluation_batches(dataset, rows_planned, layout.workers, rank, layout.micro_batch, known)
        batches = interruptible(read, training.context.observer, "evaluate", min(rows_planned, len(dataset)))
        rows: list[list[float]] = []
        was_training = engine.module.training
        engine.module.eval()
        with torch.no_grad():
            for batch in batches:
                assert isinstance(batch, LabelledBatch)
                answer = engine.module(batch.to(engine.device))
                confidence_B, guesses_B = torch.softmax(answer["logits"], dim=1).max(dim=1)
                columns = (batch.labels_B, guesses_B, confidence_B, answer["losses"], batch.sample_ids_B)
                rows += [
                    line for line in torch.stack([c.double().cpu() for c in columns], dim=1).tolist() if line[0] >= 0
                ]
        engine.module.train(was_training)
        table = np.array([line for part in distributed.gather_json(rows) for line in part])
        if len(table) == 0:
            raise RequestError("no held-out row has a label")
        labels, guesses = table[:, 0].astype(int), table[:, 1].astype(int)
        predictions = Predictions(labels, guesses, table[:, 2], table[:, 3], dataset.classes)

        def of_source(own: range, _: int) -> dict[str, float]:
            is_own = (table[:, 4] >= own.start) & (table[:, 4] < own.stop)
            if not is_own.any():
                return {}
            return {"loss": float(table[is_own, 3].mean()), "accuracy": float((labels == guesses)[is_own].mean())}

        scalars = predictions.scalars() | per_source(dataset, rows_planned, of_source, ("loss", "accuracy"))
        return Evaluation(scalars, predictions.tables(), _gate_reasons(predictions))

    return run


def _gate_reasons(predictions: Predictions) -> tuple[str, ...]:
    """Return why later stages should not build on it: it is no better than naming the commonest class."""
    accuracy, commonest = predictions.scalars()["accuracy"], predictions.commonest_share()
    if accuracy > commonest:
        return ()
    return (f"held-out accuracy {accuracy:.3f} is not above the commonest class's share, {commonest:.3f}",)
