"""Fine-tuning of an encoder to a classifier of texts, full or with adapters, maybe beside rows without a label."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recipes.errors import RequestError
from recipes.models.encoder import Corruption
from recipes.stages.base import SourceUse
from recipes.stages.finetune import Finetune
from trainers.data.dataset import Dataset
from trainers.data.labelled_batches import LabelledPlan, labelled_evaluation_batches, split_by_label
from trainers.data.masking import Masker
from trainers.data.materialise import DataRequest
from trainers.data.tokenizer import load_tokenization
from trainers.engine.protocol import Engine
from trainers.evaluation.class_metrics import Predictions
from trainers.models.load import CLASSIFIER_PARTS, load_model
from trainers.models.lora import add_adapter
from trainers.training import distributed
from trainers.training.context import Draft, StageContext, data_request, model_folder, open_sets
from trainers.training.objectives.classification import ClassificationObjective, ClassLosses
from trainers.training.observer import interruptible
from trainers.training.precision import dtype_of, use_fast_matmul
from trainers.training.randomness import stream_seed
from trainers.training.steps import PlannedBatches, TrainingPlan, plan_training
from trainers.training.text_candidate import TrainedText, write_text_draft

WRAPPER = "model."
"""Prefix that `ClassLosses` gives to the model's parameter names."""


def run_classification(spec: Finetune, context: StageContext) -> Draft | None:
    """Train a classifier; the draft comes from rank 0. Collective."""
    context.observer.phase("data")
    use_fast_matmul(context.ranks.device)
    tokenization = load_tokenization(model_folder(context, "init_from"))

    def request(use: SourceUse) -> DataRequest:
        return data_request(context, replace(use, role="labels"), tokenization, spec.train.sequence_length)

    dataset, evaluation_set = open_sets(spec, context, request)
    if evaluation_set is not None:
        evaluation_set = _with_classes(evaluation_set, dataset.classes)
    labelled, unlabelled = split_by_label(dataset, spec.labelled_share)

    context.observer.phase("model")
    model, peft_config = _build_model(spec, context, dataset.classes)
    training = plan_training(spec, context, len(labelled))
    phase = training.phase(ClassLosses(model, spec.pseudo_labels), ClassificationObjective(spec.pseudo_labels))
    pseudo, seed = spec.pseudo_labels, context.seed
    masker = None if pseudo is None else Masker(Corruption(share=pseudo.hidden_share), tokenization, seed)
    plan = LabelledPlan(dataset, labelled, unlabelled, pseudo, masker, seed=seed, **training.share)
    found: list[Predictions] = []
    outcome = training.run(
        [phase],
        PlannedBatches(plan, training.steps),
        None if evaluation_set is None else _evaluation(phase.engine, evaluation_set, spec, training, found),
    )
    predictions = found[-1] if found else None
    tables = {} if predictions is None else predictions.tables()
    dtype = dtype_of(spec.shard.precision)
    draft = write_text_draft(
        TrainedText("text_classifier", model, WRAPPER, tokenization, dtype, peft_config, CLASSIFIER_PARTS),
        context,
        phase.engine,
        training.checkpoint,
        outcome,
        artifact="text_classifier",
        metrics={
            **outcome.amounts(),
            "evaluation": outcome.finite_evaluation() | tables,
            "rows": {"labelled": len(labelled), "unlabelled": len(unlabelled)},
            "data": dataset.report.to_json(),
        },
        gate_reasons=_gate_reasons(predictions),
    )
    phase.engine.close()
    return draft


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
        return model, None
    excluded = [f"{part.rsplit('.', 1)[-1]}.dense" for part in CLASSIFIER_PARTS if "." in part]
    seed = stream_seed(context.seed, "adapter")
    return model, add_adapter(model, spec.lora, seed=seed, exclude=excluded, heads=CLASSIFIER_PARTS)


def _with_classes(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Number held-out labels as the training set does; raises RequestError for a class that it does not have."""
    unknown = sorted(set(dataset.classes) - set(classes))
    if unknown:
        raise RequestError(f"held-out rows have the classes {', '.join(unknown)}, which no training row has")
    numbers = np.array([*(classes.index(name) for name in dataset.classes), -1], dtype=np.int64)
    return replace(
        dataset, classes=classes, arrays={**dataset.arrays, "labels": numbers[np.asarray(dataset.arrays["labels"])]}
    )


def _evaluation(
    engine: Engine, dataset: Dataset, spec: Finetune, training: TrainingPlan[Finetune], found: list[Predictions]
) -> Callable[[], dict[str, float]]:
    """Return the evaluation of the stage, which leaves what it saw in `found`; collective."""

    def run() -> dict[str, float]:
        rank, layout, rows_planned = distributed.rank(), training.layout, spec.train.evaluation_rows
        read = labelled_evaluation_batches(dataset, rows_planned, layout.workers, rank, layout.micro_batch)
        batches = interruptible(read, training.context.observer, "evaluate", min(rows_planned, len(dataset)))
        rows: list[list[float]] = []
        was_training = engine.module.training
        engine.module.eval()
        with torch.no_grad():
            for batch in batches:
                answer = engine.module(batch.to(engine.device))
                confidence_B, guesses_B = torch.softmax(answer["logits"], dim=1).max(dim=1)
                columns = (batch.labels_B, guesses_B, confidence_B, answer["losses"])
                rows += [
                    line for line in torch.stack([c.double().cpu() for c in columns], dim=1).tolist() if line[0] >= 0
                ]
        engine.module.train(was_training)
        table = np.array([line for part in distributed.gather_json(rows) for line in part])
        if len(table) == 0:
            raise RequestError("no held-out row has a label")
        labels, guesses = table[:, 0].astype(int), table[:, 1].astype(int)
        found.append(Predictions(labels, guesses, table[:, 2], table[:, 3], dataset.classes))
        return found[-1].scalars()

    return run


def _gate_reasons(predictions: Predictions | None) -> tuple[str, ...]:
    """Return why later stages should not build on it: it is no better than naming the commonest class."""
    if predictions is None:
        return ()
    accuracy, commonest = predictions.scalars()["accuracy"], predictions.commonest_share()
    if accuracy > commonest:
        return ()
    return (f"held-out accuracy {accuracy:.3f} is not above the commonest class's share, {commonest:.3f}",)
