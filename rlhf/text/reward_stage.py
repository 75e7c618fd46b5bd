"""The reward stage: train a score model on preference pairs, measure it on held-out ones, hand back a draft."""

import math
from typing import Any

from recipes.stages.reward import Reward
from rlhf.text.reward_model import RewardEvaluation, RewardObjective, ScoreModel, evaluate_pairs, failed_gates
from trainers.data.batches import BatchPlan, PairBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import load_tokenization
from trainers.engine.protocol import Engine
from trainers.models.load import head_name
from trainers.models.lora import add_adapter, start_names
from trainers.models.stack import load_exact, load_stack
from trainers.training.context import Draft, StageContext, data_request, model_folder, model_weights, open_sets
from trainers.training.observer import interruptible
from trainers.training.precision import dtype_of, use_fast_matmul
from trainers.training.randomness import stream_seed
from trainers.training.steps import PlannedBatches, TrainingPlan, plan_training
from trainers.training.text_candidate import TrainedText, write_text_draft

WRAPPER = "network."
"""Prefix that `ScoreModel` gives to the network's parameter names."""


def run_reward(spec: Reward, context: StageContext) -> Draft | None:
    """Train a reward model; the draft comes from rank 0. Collective."""
    context.observer.phase("data")
    use_fast_matmul(context.ranks.device)
    tokenization = load_tokenization(model_folder(context, "init_from"))
    length = spec.train.sequence_length
    dataset, held_out = open_sets(
        spec, context, lambda use: data_request(context, use, tokenization, length, spec.template)
    )
    evaluation_set = dataset if held_out is None else held_out

    context.observer.phase("model")
    network, head, peft_config, stack = _build_network(spec, context)
    training = plan_training(spec, context, len(dataset))
    phase = training.phase(ScoreModel(network, head), RewardObjective(spec.center_coefficient))
    evaluations: list[RewardEvaluation] = []

    def evaluate() -> dict[str, float]:
        evaluations.append(_evaluation(phase.engine, evaluation_set, training))
        return evaluations[-1].metrics()

    plan = BatchPlan(dataset, context.seed, **training.share)
    outcome = training.run([phase], PlannedBatches(plan, training.steps), evaluate)
    evaluation = evaluations[-1]
    measured = {name: value for name, value in evaluation.metrics().items() if math.isfinite(value)}
    dtype = dtype_of(spec.shard.precision)
    draft = write_text_draft(
        TrainedText("score_model", network, WRAPPER, tokenization, dtype, peft_config, (head,), stack=stack),
        context,
        phase.engine,
        training.checkpoint,
        outcome,
        artifact="reward_model",
        metrics={
            **outcome.amounts(),
            "evaluation": {**measured, "held_out": held_out is not None},
            "scores": {"mean": evaluation.score_mean, "std": evaluation.score_std},
            "data": dataset.report.to_json(),
        },
        gate_reasons=tuple(failed_gates(evaluation, spec.min_accuracy)),
    )
    phase.engine.close()
    return draft


def _build_network(spec: Reward, context: StageContext) -> tuple[Any, str, Any, tuple[str, ...]]:
    """Return the model with a scalar head, the head's name, peft's configuration of an adapter, and what it lies on."""
    weights = model_weights(context, "init_from", spec.lora)
    load = load_exact if spec.lora is None else load_stack
    seed = stream_seed(context.seed, "head")
    network = load(weights, "score_model", device=context.ranks.device, new_head_seed=seed)
    head = head_name(network)
    if spec.lora is None:
        return network, head, None, ()
    seed, on = stream_seed(context.seed, "adapter"), start_names(len(weights.adapters))
    return network, head, add_adapter(network, spec.lora, seed=seed, heads=[head], on=on), weights.stack


def _evaluation(engine: Engine, dataset: Dataset, training: TrainingPlan[Reward]) -> RewardEvaluation:
    """Rank held-out pairs; collective."""
    engine.module.eval()
    rows, layout, context = training.spec.train.evaluation_rows, training.layout, training.context
    batches = evaluation_batches(dataset, rows, layout.workers, context.ranks.rank, layout.micro_batch)
    pairs = (batch for batch in batches if isinstance(batch, PairBatch))
    shown = interruptible(pairs, context.observer, "evaluate", min(rows, len(dataset)))
    found = evaluate_pairs(engine.module, shown, engine.device)
    engine.module.train()
    return found
