"""The reward stage: train a score model on preference pairs, measure it on held-out ones, hand back a candidate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.stages.reward import Reward
from rlhf.text.judged_rows import JudgedRows, open_judged_rows
from rlhf.text.known_answers import ordinary_tokens
from rlhf.text.negatives import MadeAnswers, sampled_rows, written_by
from rlhf.text.reward_model import RewardEvaluation, RewardObjective, ScoreModel, evaluate_pairs, failed_gates
from trainers.data.batches import BatchPlan, PairBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.engine.protocol import Engine
from trainers.evaluation.held_out import per_source
from trainers.models.load import head_name, text_facts
from trainers.models.lora import add_adapter, start_names
from trainers.models.stack import load_exact, load_trained
from trainers.objectives.protocol import unchanged
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.training.context import Candidate, StageContext, model_folder, model_weights
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course, run_training
from trainers.training.text_candidate import TrainedText, write_text_candidate

Prepare = Callable[[Any, int], Any]
"""What the objective reads of a batch at a step."""
WRAPPER = "network."
"""Prefix that `ScoreModel` gives to the network's parameter names."""


@dataclass(frozen=True)
class RewardTask:
    """Training of a reward model."""

    spec: Reward
    context: StageContext

    def open_data(self) -> JudgedRows:
        """Open the pairs."""
        return open_judged_rows(self.spec, self.context)

    def build(self, data: JudgedRows) -> "RewardTrainee":
        """Load the backbone with a new scalar head."""
        network, head, peft_config, stack = _build_network(self.spec, self.context)
        return RewardTrainee(self.spec, self.context, data, network, head, peft_config, stack)


@dataclass(frozen=True)
class RewardTrainee:
    """A score model on its pairs."""

    spec: Reward
    context: StageContext
    data: JudgedRows
    network: Any
    head: str
    peft_config: Any
    stack: tuple[str, ...]
    """What an adapter lies on: the digests of the base and of the adapters on it."""

    @property
    def num_rows(self) -> int:
        """Pairs of an epoch."""
        return self.data.training.order(self.context.seed).epoch

    def course(self, training: TrainingPlan[Reward]) -> Course:
        """One engine; measured on held-out pairs, or on the training's where there are none. Collective."""
        spec, data = self.spec, self.data
        phase = single_phase(training, ScoreModel(self.network, self.head), RewardObjective(spec.center_coefficient))
        measured = data.measured

        def evaluate() -> Evaluation:
            found, of_sources = _evaluation(phase.engine, measured, training)
            reasons = tuple(failed_gates(found, spec.min_accuracy))
            return Evaluation({**found.metrics(), **of_sources}, gate_reasons=reasons)

        plan = BatchPlan(data.training, self.context.seed, **training.share)
        return Course([phase], PlannedBatches(plan, training.steps, self._prepare(plan, training.steps)), evaluate)

    def _prepare(self, plan: BatchPlan, steps: int) -> Prepare:
        """What replaces rejected answers by made ones, if the recipe has `negatives`; collective."""
        spec, context, data = self.spec, self.context, self.data
        negatives = spec.negatives
        if negatives is None:
            return unchanged
        samples: dict[int, list[int]] = {}
        if rows := sampled_rows(negatives, plan, context.seed, steps):
            dtype, device = dtype_of(spec.shard.precision), context.ranks.device
            model = load_exact(model_weights(context, "init_from"), "language_model", device=device, dtype=dtype)

            def watch(share: float) -> None:
                context.observer.phase("answer", rows=int(share * len(rows)), rows_planned=len(rows))

            start = model.to(device).eval()
            samples = written_by(start, rows, data.training, data.tokenization, negatives, context.seed, watch)
        ordinary, length = ordinary_tokens(data.tokenization), spec.train.sequence_length
        return MadeAnswers(negatives, data.training, ordinary, context.seed, length, samples).replaced

    def candidate(self, training: TrainingPlan[Reward], course: Course, outcome: Outcome) -> Candidate | None:
        """Write the reward model with the statistics that its scores are normalised by; collective."""
        data, found, dtype = self.data, outcome.evaluation, dtype_of(self.spec.shard.precision)
        return write_text_candidate(
            TrainedText(
                *("score_model", self.network, WRAPPER, data.tokenization, dtype, self.peft_config, (self.head,)),
                stack=self.stack,
            ),
            self.context,
            course.phases[0].engine,
            training.checkpoint,
            outcome,
            artifact="reward_model",
            metrics={
                **outcome.amounts(),
                "evaluation": {**found.finite(), "held_out": data.held_out is not None},
                "scores": {"mean": found.scalars["score_mean"], "std": found.scalars["score_std"]},
                "data": data.training.report.to_json(),
            },
        )


def run_reward(spec: Reward, context: StageContext) -> Candidate | None:
    """Train a reward model; the candidate comes from rank 0. Collective."""
    spec.check_model(text_facts(model_folder(context, "init_from")))
    return run_training(RewardTask(spec, context))


def _build_network(spec: Reward, context: StageContext) -> tuple[Any, str, Any, tuple[str, ...]]:
    """Return the model with a scalar head, the head's name, peft's configuration of an adapter, and what it lies on."""
    weights = model_weights(context, "init_from", spec.lora)
    seed = stream_seed(context.seed, "head")
    given: dict[str, Any] = {"device": context.ranks.device, "new_head_seed": seed}
    network = load_trained(weights, "score_model", spec.lora, spec.shard, **given)
    head = head_name(network)
    if spec.lora is None:
        return network, head, None, ()
    seed, on = stream_seed(context.seed, "adapter"), start_names(len(weights.adapters))
    return network, head, add_adapter(network, spec.lora, seed=seed, heads=[head], on=on), weights.stack


def _evaluation(
    engine: Engine, dataset: Dataset, training: TrainingPlan[Reward]
) -> tuple[RewardEvaluation, dict[str, float]]:
    """Rank held-out pairs, and those of each source of a mixture; collective."""
    rows, layout, context = training.spec.train.evaluation_rows, training.layout, training.context

    def measured(own: range, count: int) -> RewardEvaluation:
        batches = evaluation_batches(dataset, count, layout.workers, context.ranks.rank, layout.micro_batch, own)
        pairs = (batch for batch in batches if isinstance(batch, PairBatch))
        return evaluate_pairs(engine.module, interruptible(pairs, context.observer, "evaluate", count), engine.device)

    engine.module.eval()
    found = measured(range(len(dataset)), min(rows, len(dataset)))
    names = ("loss", "accuracy")
    of_sources = per_source(dataset, rows, lambda own, count: measured(own, count).metrics(), names)
    engine.module.train()
    return found, of_sources
