"""Reinforcement learning as one task: whatever is sampled goes the way of every training."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from recipes.stages.rl import RlText
from rlhf.images.stage import ImageRl
from rlhf.text.stage import TextRl
from rlhf.trainee import RlModels, RlSpec, RlTrainee
from trainers.training.context import Candidate, StageContext
from trainers.training.task import run_training

Data = TypeVar("Data")


class Medium(Protocol[Data]):
    """What a kind of sample needs: responses, or images."""

    def open_data(self) -> Data:
        """Open what the policy is asked; collective."""

    def build(self, data: Data) -> RlModels[Any]:
        """Build or load the models, whole and equal on every rank."""


@dataclass(frozen=True)
class RlTask(Generic[Data]):
    """Reinforcement learning of a policy that writes or draws."""

    spec: RlSpec
    context: StageContext
    medium: Medium[Data]

    def open_data(self) -> Data:
        """Open what the policy is asked."""
        return self.medium.open_data()

    def build(self, data: Data) -> RlTrainee[Any]:
        """Build the models."""
        return RlTrainee(self.spec, self.context, self.medium.build(data))


def run_rl(spec: RlSpec, context: StageContext) -> Candidate | None:
    """Tune a policy against a reward; the candidate comes from rank 0. Collective."""
    with ExitStack() as closing:
        medium: Medium[Any] = TextRl(spec, context, closing) if isinstance(spec, RlText) else ImageRl(spec, context)
        return run_training(RlTask(spec, context, medium))
