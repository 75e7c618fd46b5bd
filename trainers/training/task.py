"""A training stage as a task, and the one way that every task goes: data, model, loop, candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from trainers.runtime.precision import use_fast_matmul
from trainers.training.context import Candidate, StageContext
from trainers.training.optimiser_step import BatchSource, Phase
from trainers.training.outcome import Evaluate, Outcome
from trainers.training.steps import S, TrainingPlan, plan_training


@dataclass(frozen=True)
class Course:
    """What goes through the loop: the phases of a step, their batches, and how the model is measured on the way."""

    phases: Sequence[Phase]
    source: BatchSource
    evaluate: Evaluate | None


class Trainee(Protocol[S]):
    """A model that is ready to be trained on its data; equal on all ranks."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""

    def course(self, training: TrainingPlan[S]) -> Course:
        """Put the model under its engines and say what they are fed; collective."""

    def candidate(self, training: TrainingPlan[S], course: Course, outcome: Outcome) -> Candidate | None:
        """Write and upload what was trained; the candidate comes from rank 0. Collective."""


Data = TypeVar("Data")


class TrainingTask(Protocol[S, Data]):
    """One way of training: which data, and which model learns from it."""

    @property
    def spec(self) -> S:
        """The stage of the recipe."""

    @property
    def context(self) -> StageContext:
        """Where it runs and what it was given."""

    def open_data(self) -> Data:
        """Open, or build, the stage's tokenizer and data sets; collective."""

    def build(self, data: Data) -> Trainee[S]:
        """Build or load the model, whole and equal on every rank."""


def run_training(task: TrainingTask[S, Data]) -> Candidate | None:
    """Train from data to candidate; the candidate comes from rank 0. Collective."""
    spec, context = task.spec, task.context
    context.observer.phase("data")
    use_fast_matmul(context.ranks.device)
    data = task.open_data()
    context.observer.phase("model")
    trainee = task.build(data)
    del data  # models that were opened to be copied are let go of
    training = plan_training(spec, context, trainee.num_rows)
    course = trainee.course(training)
    outcome = training.run(course.phases, course.source, course.evaluate)
    candidate = trainee.candidate(training, course, outcome)
    for phase in course.phases:
        phase.engine.close()
    return candidate
