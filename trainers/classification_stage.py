"""Fine-tuning of an encoder to a classifier of texts, full or with adapters, maybe beside rows without a label."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recipes.derive import planned_steps
from recipes.encoders import Corruption
from recipes.errors import RequestError
from recipes.references import find_source, get_source
from recipes.stages import Finetune
from trainers import distributed
from trainers.architectures.load import CLASSIFIER_PARTS, load_model
from trainers.architectures.lora import add_adapter, learn_heads
from trainers.class_metrics import Predictions
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.engine.protocol import Engine
from trainers.labelled_batches import LabelledPlan, labelled_evaluation_batches, split_by_label
from trainers.loop import train
from trainers.masking import Masker
from trainers.objectives.classification import ClassificationObjective, ClassLosses
from trainers.precision import dtype_of, use_fast_matmul
from trainers.randomness import stream_seed
from trainers.stage import Draft, StageContext, data_request, model_folder, open_dataset
from trainers.steps import PlannedBatches, cadence_of, one_group, stage_layout, training_engine
from trainers.store.manifest import Layout
from trainers.text_draft import TrainedText, write_text_draft

WRAPPER = "model."
"""Prefix that `ClassLosses` gives to the model's parameter names."""


def run_classification(spec: Finetune, context: StageContext) -> Draft | None:
    """Train a classifier; the draft comes from rank 0. Collective."""
    ranks, observer, shard = context.ranks, context.observer, spec.shard
    observer.phase("data")
    use_fast_matmul(ranks.device)
    tokenization = load_tokenization(model_folder(context, "init_from"))
    dataset = _open(spec, context, tokenization, "data")
    assert dataset is not None
    evaluation_set = _open(spec, context, tokenization, "evaluation")
    if evaluation_set is not None:
        evaluation_set = _with_classes(evaluation_set, dataset.classes)
    labelled, unlabelled = split_by_label(dataset, spec.labelled_share)

    observer.phase("model")
    model, peft_config = _build_model(spec, context, dataset.classes)
    engine = training_engine(ClassLosses(model, spec.pseudo_labels), spec.train, shard, ranks.device)

    steps = planned_steps(spec.train, len(labelled))
    assert steps is not None
    layout = stage_layout(context, spec.train.global_batch, shard.micro_batch)
    pseudo = spec.pseudo_labels
    plan = LabelledPlan(
        dataset,
        labelled,
        unlabelled,
        pseudo,
        None if pseudo is None else Masker(Corruption(share=pseudo.hidden_share), tokenization, context.seed),
        seed=context.seed,
        global_batch=spec.train.global_batch,
        workers=layout.workers,
        rank=ranks.rank,
        micro_batch=layout.micro_batch,
    )
    checkpoint = context.checkpoint(layout)
    found: list[Predictions] = []
    outcome = train(
        engine,
        ClassificationObjective(pseudo),
        PlannedBatches(plan, steps),
        learning_rates=one_group(spec.train.optimizer.lr, spec.train.schedule, steps),
        cadence=cadence_of(spec.train),
        checkpoint=checkpoint,
        evaluate=None if evaluation_set is None else _evaluation(engine, evaluation_set, spec, layout, found),
        observer=observer,
        seed=context.seed,
    )
    observer.phase("write")
    predictions = found[-1] if found else None
    tables = {} if predictions is None else predictions.tables()
    dtype = dtype_of(shard.precision)
    draft = write_text_draft(
        TrainedText("text_classifier", model, WRAPPER, tokenization, dtype, peft_config, CLASSIFIER_PARTS),
        context,
        engine,
        checkpoint,
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
    engine.close()
    return draft


def _open(spec: Finetune, context: StageContext, tokenization: Tokenization, field_path: str) -> Dataset | None:
    use = find_source(spec, field_path) if field_path != "data" else get_source(spec, field_path)
    if use is None:
        return None
    request = data_request(context, use, tokenization, spec.train.sequence_length)
    return open_dataset(context, replace(request, role="labels"))


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
    peft_config = add_adapter(model, spec.lora, seed=stream_seed(context.seed, "adapter"), exclude=excluded)
    learn_heads(model, CLASSIFIER_PARTS)
    return model, peft_config


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
    engine: Engine, dataset: Dataset, spec: Finetune, layout: Layout, found: list[Predictions]
) -> Callable[[], dict[str, float]]:
    """Return the evaluation of the stage, which leaves what it saw in `found`; collective."""

    def run() -> dict[str, float]:
        rank = distributed.rank()
        batches = labelled_evaluation_batches(
            dataset, spec.train.evaluation_rows, layout.workers, rank, layout.micro_batch
        )
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
