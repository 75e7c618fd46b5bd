"""The reward stage: train a score model on preference pairs, measure it on held-out ones, hand back a draft."""

import math

from recipes.derive import planned_steps
from recipes.references import find_source, get_source
from recipes.stages import Reward
from rlhf.reward import RewardEvaluation, RewardObjective, ScoreModel, evaluate_pairs, failed_gates
from trainers.architectures.load import head_name, load_model
from trainers.architectures.lora import add_adapter, learn_heads
from trainers.data.batches import BatchPlan, PairBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import load_tokenization
from trainers.engine.protocol import Engine
from trainers.loop import train
from trainers.precision import dtype_of, use_fast_matmul
from trainers.randomness import stream_seed
from trainers.stage import Draft, StageContext, data_request, model_folder, open_dataset
from trainers.steps import PlannedBatches, cadence_of, one_group, stage_layout, training_engine
from trainers.store.manifest import Layout
from trainers.text_draft import TrainedText, write_text_draft

WRAPPER = "network."
"""Prefix that `ScoreModel` gives to the network's parameter names."""


def run_reward(spec: Reward, context: StageContext) -> Draft | None:
    """Train a reward model; the draft comes from rank 0. Collective."""
    ranks, observer, shard = context.ranks, context.observer, spec.shard
    observer.phase("data")
    use_fast_matmul(ranks.device)
    tokenization = load_tokenization(model_folder(context, "init_from"))
    length = spec.train.sequence_length
    dataset = open_dataset(context, data_request(context, get_source(spec, "data"), tokenization, length))
    held_out = find_source(spec, "evaluation")
    evaluation_set = (
        dataset if held_out is None else open_dataset(context, data_request(context, held_out, tokenization, length))
    )

    observer.phase("model")
    network = load_model(
        model_folder(context, "init_from"),
        "score_model",
        device=ranks.device,
        new_head_seed=stream_seed(context.seed, "head"),
    )
    heads = (head_name(network),)
    peft_config = None
    if spec.lora is not None:
        peft_config = add_adapter(network, spec.lora, seed=stream_seed(context.seed, "adapter"))
        learn_heads(network, heads)
    wrapped = ScoreModel(network, *heads)
    engine = training_engine(wrapped, spec.train, shard, ranks.device)

    steps = planned_steps(spec.train, len(dataset))
    assert steps is not None
    layout = stage_layout(context, spec.train.global_batch, shard.micro_batch)
    plan = BatchPlan(dataset, context.seed, spec.train.global_batch, layout.workers, ranks.rank, layout.micro_batch)
    evaluations: list[RewardEvaluation] = []

    def evaluate() -> dict[str, float]:
        evaluations.append(_evaluation(engine, evaluation_set, spec, layout, ranks.rank))
        return evaluations[-1].metrics()

    checkpoint = context.checkpoint(layout)
    outcome = train(
        engine,
        RewardObjective(spec.center_coefficient),
        PlannedBatches(plan, steps),
        learning_rates=one_group(spec.train.optimizer.lr, spec.train.schedule, steps),
        cadence=cadence_of(spec.train),
        checkpoint=checkpoint,
        evaluate=evaluate,
        observer=observer,
        seed=context.seed,
    )
    observer.phase("write")
    evaluation = evaluations[-1]
    measured = {name: value for name, value in evaluation.metrics().items() if math.isfinite(value)}
    dtype = dtype_of(shard.precision)
    draft = write_text_draft(
        TrainedText("score_model", network, WRAPPER, tokenization, dtype, peft_config, heads),
        context,
        engine,
        checkpoint,
        outcome,
        artifact="reward_model",
        metrics={
            **outcome.amounts(),
            "evaluation": {**measured, "held_out": evaluation_set is not dataset},
            "scores": {"mean": evaluation.score_mean, "std": evaluation.score_std},
            "data": dataset.report.to_json(),
        },
        gate_reasons=tuple(failed_gates(evaluation, spec.min_accuracy)),
    )
    engine.close()
    return draft


def _evaluation(engine: Engine, dataset: Dataset, spec: Reward, layout: Layout, rank: int) -> RewardEvaluation:
    """Rank held-out pairs; collective."""
    engine.module.eval()
    batches = evaluation_batches(dataset, spec.train.evaluation_rows, layout.workers, rank, layout.micro_batch)
    found = evaluate_pairs(engine.module, (batch for batch in batches if isinstance(batch, PairBatch)), engine.device)
    engine.module.train()
    return found
