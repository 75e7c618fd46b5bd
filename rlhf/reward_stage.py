"""The reward stage: train a score model on preference pairs, measure it on held-out ones, hand back a draft."""

import math
from typing import Any

from recipes.derive import planned_steps
from recipes.references import find_source, get_source
from recipes.stages import Reward
from rlhf.heads import adapter_with_head, learn_head, peft_task
from rlhf.reward import RewardEvaluation, RewardObjective, ScoreModel, evaluate_pairs, failed_gates
from trainers.architectures.load import head_name, load_model
from trainers.architectures.lora import add_adapter, merged_tensors
from trainers.artifacts import model_config, probe, write_adapter, write_model
from trainers.checkpoint import StoreCheckpoint
from trainers.data.batches import BatchPlan, PairBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.engine.build import build_engine, parameter_group
from trainers.engine.protocol import Engine
from trainers.loop import Outcome, train
from trainers.precision import dtype_of, use_fast_matmul
from trainers.randomness import stream_seed
from trainers.stage import (
    Check,
    Draft,
    StageContext,
    data_request,
    draft_folder,
    model_folder,
    model_part,
    open_dataset,
    put_probe,
)
from trainers.steps import GROUP, PlannedBatches, cadence_of, one_group, stage_layout
from trainers.store.manifest import FileEntry, Layout

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
    peft_config = None
    if spec.lora is not None:
        peft_config = add_adapter(network, spec.lora, seed=stream_seed(context.seed, "adapter"))
        learn_head(network)
    wrapped = ScoreModel(network, head_name(network))
    group = parameter_group(GROUP, wrapped, spec.train.optimizer)
    engine = build_engine(wrapped, [group], shard, clip=spec.train.gradient_clipping, device=ranks.device)
    engine.module.train()

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
    is_held_out = evaluation_set is not dataset
    draft = _write_draft(
        spec, context, engine, peft_config, tokenization, outcome, evaluations[-1], is_held_out, dataset, checkpoint
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


def _write_draft(
    spec: Reward,
    context: StageContext,
    engine: Engine,
    peft_config: Any,
    tokenization: Tokenization,
    outcome: Outcome,
    evaluation: RewardEvaluation,
    is_held_out: bool,
    dataset: Dataset,
    checkpoint: StoreCheckpoint,
) -> Draft | None:
    """Write, probe and upload what the stage made; the draft comes from rank 0. Collective."""
    dtype = dtype_of(spec.shard.precision)
    is_first = context.ranks.rank == 0
    with engine.gathered() as module:
        network: Any = module.get_submodule(WRAPPER.removesuffix("."))
        found = probe(network, "score_model", tokenization.vocab_size) if is_first else None
    tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in engine.full_parameters()}
    if found is None:
        return None
    probe_entry = put_probe(context.store, found)
    base = context.inputs["init_from"].digest if peft_config is not None else None
    checks = [Check("score_model", "model", probe_entry)]
    with draft_folder() as folder:
        if base is not None:
            adapter = adapter_with_head(tensors, head_name(network))
            config = peft_task(peft_config, "score_model", head_name(network))
            write_adapter(folder / "adapter", config, adapter.items(), base_digest=base, dtype=dtype)
            base_part = model_part(context.inputs["init_from"], "init_from")
            checks.append(Check("score_model", base_part, probe_entry, adapter="adapter", base="init_from"))
        whole = tensors if base is None else merged_tensors(network, tensors)
        write_model(folder / "model", "score_model", network.config, whole.items(), tokenization.files(), dtype=dtype)
        files: dict[str, FileEntry] = context.store.objects.put_folder(folder)
    measured = {name: value for name, value in evaluation.metrics().items() if math.isfinite(value)}
    return Draft(
        kind="reward_model",
        files=files,
        checks=tuple(checks),
        outcome=outcome.ending(),
        metrics={
            **outcome.amounts(),
            "evaluation": {**measured, "held_out": is_held_out},
            "scores": {"mean": evaluation.score_mean, "std": evaluation.score_std},
            "data": dataset.report.to_json(),
        },
        gate_reasons=tuple(failed_gates(evaluation, spec.min_accuracy)),
        contract=tokenization.contract_hash,
        base=base,
        architecture=model_config(network.config, "score_model", dtype),
        exactness=checkpoint.exactness,
        changes=tuple(checkpoint.made_changes),
    )
