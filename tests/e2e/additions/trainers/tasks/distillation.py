"""The distill stage: a student's distribution of every next token is drawn to a frozen teacher's."""

from dataclasses import dataclass
from typing import Any

import torch
from recipes.stages.distill import Distill
from torch import Tensor, nn
from torch.nn.functional import kl_div

from trainers.data.batches import BatchPlan, TokenBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.held_out import evaluate
from trainers.models.forward_forms import head_logits
from trainers.models.stack import load_exact
from trainers.models.token_losses import hidden_states
from trainers.objectives.protocol import ObjectiveOutput
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.training.context import (
    Candidate,
    StageContext,
    check_tokenizers,
    model_folder,
    model_weights,
    open_sets,
    text_request,
)
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course, run_training
from trainers.training.text_candidate import TrainedText, write_text_candidate


class Distillation(nn.Module):
    """A student beside its teacher, which is no part of it: nothing of the teacher is trained or stored."""

    def __init__(self, student: nn.Module, teacher: nn.Module, temperature: float) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self._temperature = temperature

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Sums over target tokens: T^2 KL(teacher || student) at temperature T (section 2), and equal first guesses."""
        with torch.no_grad():
            wanted_NV = self._logprobs(self._teacher[0], batch)
        found_NV = self._logprobs(self.student, batch)
        divergence = kl_div(found_NV, wanted_NV, reduction="sum", log_target=True)
        return divergence * self._temperature**2, (found_NV.argmax(dim=1) == wanted_NV.argmax(dim=1)).sum()

    def _logprobs(self, model: Any, batch: TokenBatch) -> Tensor:
        states_BTD = hidden_states(model, batch.input_ids_BT, batch.segment_ids_BT, batch.position_ids_BT)
        logits_NV = head_logits(model, states_BTD[:, :-1][batch.loss_mask_BT[:, 1:]])
        return (logits_NV.float() / self._temperature).log_softmax(dim=-1)


class DistillationObjective:
    """The mean divergence over the target tokens of the global batch."""

    def weight(self, batch: TokenBatch) -> float:
        return float(batch.loss_mask_BT[:, 1:].sum())

    def loss(self, module: nn.Module, batch: TokenBatch) -> ObjectiveOutput:
        divergence, agreeing = module(batch)
        count = self.weight(batch)
        return ObjectiveOutput(divergence, {"loss": (divergence.detach(), count), "agreement": (agreeing, count)})


@dataclass(frozen=True)
class Texts:
    """Packed texts, and how they are read."""

    tokenization: Tokenization
    training: Dataset
    held_out: Dataset | None


@dataclass(frozen=True)
class DistillTask:
    """Training of a student on texts."""

    spec: Distill
    context: StageContext

    def open_data(self) -> Texts:
        spec, context = self.spec, self.context
        tokenization = load_tokenization(model_folder(context, "init_from"))
        length = spec.train.sequence_length
        return Texts(
            tokenization, *open_sets(spec, context, lambda use: text_request(context, use, tokenization, length))
        )

    def build(self, data: Texts) -> "Student":
        student, teacher = (
            load_exact(model_weights(self.context, name), "language_model", device=self.context.ranks.device)
            for name in ("init_from", "teacher")
        )
        return Student(self.spec, self.context, data, student, teacher.eval().requires_grad_(False))


@dataclass(frozen=True)
class Student:
    """A student and its teacher on texts."""

    spec: Distill
    context: StageContext
    data: Texts
    student: Any
    teacher: Any

    @property
    def num_rows(self) -> int:
        return len(self.data.training)

    def course(self, training: TrainingPlan[Distill]) -> Course:
        data, context, objective = self.data, self.context, DistillationObjective()
        phase = single_phase(training, Distillation(self.student, self.teacher, self.spec.temperature), objective)
        rows, layout, held_out = self.spec.train.evaluation_rows, training.layout, data.held_out

        def measure() -> Evaluation:
            assert held_out is not None
            batches = evaluation_batches(held_out, rows, layout.workers, context.ranks.rank, layout.micro_batch)
            shown = interruptible(batches, context.observer, "evaluate", min(rows, len(held_out)))
            return Evaluation(evaluate(phase.engine.module, objective, shown, phase.engine.device))

        plan = BatchPlan(data.training, context.seed, **training.share)
        return Course([phase], PlannedBatches(plan, training.steps), None if held_out is None else measure)

    def candidate(self, training: TrainingPlan[Distill], course: Course, outcome: Outcome) -> Candidate | None:
        data, dtype = self.data, dtype_of(self.spec.shard.precision)
        return write_text_candidate(
            TrainedText("language_model", self.student, "student.", data.tokenization, dtype),
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


def run_distill(spec: Distill, context: StageContext) -> Candidate | None:
    """Train a student on what its teacher says; the candidate comes from rank 0. Collective."""
    check_tokenizers(spec, context)
    return run_training(DistillTask(spec, context))
