"""The dpo stage: a reward model's objective on the rewards that a policy implies against its start.

The reward of an answer is beta times its log-probability under the policy over that under the reference (equation 5 of
Rafailov et al. 2023), up to a term of the prompt, which is the same on both sides of a pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
from recipes.stages.dpo import Dpo
from torch import Tensor, nn

from rlhf.text.reward_model import RewardObjective, evaluate_pairs
from trainers.data.batches import BatchPlan, PairBatch, SequenceBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.models.stack import load_exact
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.training.context import Candidate, StageContext, model_folder, model_weights, open_sets, text_request
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course, run_training
from trainers.training.text_candidate import TrainedText, write_text_candidate


class ImpliedReward(nn.Module):
    """The reward of each row's response that the policy implies against a frozen reference."""

    def __init__(self, policy: nn.Module, reference: nn.Module, beta: float) -> None:
        super().__init__()
        self.policy = policy
        self._reference = (reference,)  # no submodule: nothing of it is trained or stored
        self._beta = beta

    def forward(self, sequences: SequenceBatch) -> Tensor:
        """One reward per row."""
        with torch.no_grad():
            before = _logprobs(self._reference[0], sequences)
        return self._beta * (_logprobs(self.policy, sequences) - before)


def _logprobs(model: Any, sequences: SequenceBatch) -> Tensor:
    """Log-probability of each row's response [B]."""
    logits = model(input_ids=sequences.input_ids_BT, attention_mask=sequences.attention_mask_BT).logits[:, :-1]
    chosen = logits.float().log_softmax(-1).gather(-1, sequences.input_ids_BT[:, 1:, None])[..., 0]
    return (chosen * sequences.response_mask_BT[:, 1:]).sum(dim=1)


@dataclass(frozen=True)
class PairData:
    """Preference pairs, and how they are read."""

    tokenization: Tokenization
    training: Dataset
    held_out: Dataset | None


@dataclass(frozen=True)
class DpoTask:
    """Training of a policy on preference pairs."""

    spec: Dpo
    context: StageContext

    def open_data(self) -> PairData:
        spec, context = self.spec, self.context
        tokenization = load_tokenization(model_folder(context, "init_from"))
        length = spec.train.sequence_length
        training, held_out = open_sets(
            spec, context, lambda use: text_request(context, use, tokenization, length, spec.template)
        )
        return PairData(tokenization, training, held_out)

    def build(self, data: PairData) -> "DpoTrainee":
        weights = model_weights(self.context, "init_from")
        policy, reference = (
            load_exact(weights, "language_model", device=self.context.ranks.device) for _ in ("policy", "reference")
        )
        return DpoTrainee(self.spec, self.context, data, policy, reference.eval().requires_grad_(False))


@dataclass(frozen=True)
class DpoTrainee:
    """A policy and its reference on preference pairs."""

    spec: Dpo
    context: StageContext
    data: PairData
    policy: Any
    reference: Any

    @property
    def num_rows(self) -> int:
        return len(self.data.training)

    def course(self, training: TrainingPlan[Dpo]) -> Course:
        spec, data = self.spec, self.data
        rewards = ImpliedReward(self.policy, self.reference, spec.beta)
        phase = single_phase(training, rewards, RewardObjective(0.0))
        measured = data.training if data.held_out is None else data.held_out
        rows, layout, context = spec.train.evaluation_rows, training.layout, self.context

        def evaluate() -> Evaluation:
            engine = phase.engine
            engine.module.eval()
            batches = evaluation_batches(measured, rows, layout.workers, context.ranks.rank, layout.micro_batch)
            pairs = (batch for batch in batches if isinstance(batch, PairBatch))
            shown = interruptible(pairs, context.observer, "evaluate", min(rows, len(measured)))
            found = evaluate_pairs(engine.module, shown, engine.device)
            engine.module.train()
            return Evaluation({name: found.metrics()[name] for name in ("loss", "accuracy", "margin")})

        plan = BatchPlan(data.training, context.seed, **training.share)
        return Course([phase], PlannedBatches(plan, training.steps), evaluate)

    def candidate(self, training: TrainingPlan[Dpo], course: Course, outcome: Outcome) -> Candidate | None:
        data, dtype = self.data, dtype_of(self.spec.shard.precision)
        return write_text_candidate(
            TrainedText("language_model", self.policy, "policy.", data.tokenization, dtype),
            self.context,
            course.phases[0].engine,
            training.checkpoint,
            outcome,
            artifact="model",
            metrics={
                **outcome.amounts(),
                "evaluation": outcome.evaluation.finite(),
                "data": data.training.report.to_json(),
            },
        )


def run_dpo(spec: Dpo, context: StageContext) -> Candidate | None:
    """Train a policy on preference pairs; the candidate comes from rank 0. Collective."""
    return run_training(DpoTask(spec, context))
