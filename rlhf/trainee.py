"""A policy on its way through the one loop: engine, rollouts, iterations, and what is written of it in the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol

from torch import nn

from recipes.stages.rl import RlText
from recipes.stages.rl_images import RlImages
from recipes.stages.updates import Updates
from rlhf.algorithm import algorithm_of
from rlhf.experience import ExperienceMaker
from rlhf.iterations import RlOutcome, RlSource, finish_iterations
from rlhf.objective import RlObjective
from rlhf.policy import Learner, Policy, S
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.engine.build import build_engine
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.runtime.precision import unit_roundoff
from trainers.training.context import Candidate, StageContext
from trainers.training.optimiser_step import Phase
from trainers.training.outcome import Outcome
from trainers.training.schedule import learning_rate_factor
from trainers.training.steps import TrainingPlan
from trainers.training.task import Course

RlSpec = RlText | RlImages


class RlModels(Protocol[S]):
    """A stage's models, whole and equal on every rank: what is sampled from them, and what is written of them."""

    @property
    def module(self) -> nn.Module:
        """All of them as one module."""

    @property
    def groups(self) -> Sequence[ParameterGroup]:
        """What learns: `actor`, and `critic` where the algorithm has one."""

    def policy(self, learner: Learner) -> Policy[S]:
        """What is sampled once the models are under an engine."""

    def candidate(self, engine: Engine, checkpoint: StoreCheckpoint, outcome: RlOutcome) -> Candidate | None:
        """Write and upload what was learnt; the candidate comes from rank 0. Collective."""


@dataclass(frozen=True)
class RlTrainee(Generic[S]):
    """Models that learn from what they sample."""

    spec: RlSpec
    context: StageContext
    models: RlModels[S]

    @property
    def num_rows(self) -> int:
        """0: iterations are counted, not rows."""
        return 0

    def course(self, training: TrainingPlan[RlSpec]) -> Course:
        """One engine; the source samples between its mini-batches. Collective."""
        spec, context, models = self.spec, self.context, self.models
        clip, device = spec.algorithm.gradient_clipping, context.ranks.device
        engine = build_engine(models.module, models.groups, spec.shard, clip=clip, device=device)
        roundoff = unit_roundoff(spec.shard.precision, device)
        learner = Learner(engine, training.layout.micro_batch, roundoff, context.ranks, context.seed, context.observer)
        policy, algorithm = models.policy(learner), algorithm_of(spec.algorithm, spec.nominal_length)
        assert algorithm.needs_critic == (spec.algorithm.value_model is not None)
        trained = [name for group in models.groups for name, _ in group.parameters]
        source = RlSource(ExperienceMaker(policy, algorithm, spec.algorithm, learner), trained)
        rates = partial(learning_rates, spec.algorithm)
        return Course([Phase("", engine, RlObjective(policy, algorithm, roundoff), rates)], source, None)

    def candidate(self, training: TrainingPlan[RlSpec], course: Course, outcome: Outcome) -> Candidate | None:
        """Measure the policy that is kept, and write it; collective."""
        assert isinstance(course.source, RlSource)
        ended = finish_iterations(course.source, self.context, outcome)
        return self.models.candidate(course.source.engine, training.checkpoint, ended)


def learning_rates(settings: Updates, step: int) -> Mapping[str, float]:
    """Of the actor, 0 while the critic warms up, and of the critic where there is one."""
    factor = learning_rate_factor(settings.schedule, step, settings.planned_steps)
    actor, critic = settings.optimizer.lr, settings.value_model
    if critic is None:
        return {"actor": actor * factor}
    is_warming_up = step < critic.warmup * settings.steps_per_iteration
    return {
        "actor": 0.0 if is_warming_up else actor * factor,
        "critic": (actor if critic.lr is None else critic.lr) * factor,
    }
