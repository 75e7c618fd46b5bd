"""The protocol of an environment: it begins with a prompt's row, then answers the policy's turns with observations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from recipes.stages.rewards.term import Row


@dataclass(frozen=True)
class Step:
    """What a turn of the policy led to."""

    observation: str = ""
    """The observation that the policy reads next."""
    reward: float = 0.0
    """Of the turn."""
    done: bool = False
    """Whether the turn was the last one: then the observation is not read."""


class Environment(Protocol):
    """One conversation; each sample has its own instance."""

    def reset(self, row: Row) -> str:
        """Begin with the prompt's row, by column; returns the observation before the policy's first turn, if any."""

    def step(self, action: str) -> Step:
        """Answer a turn of the policy, given as its text."""


MakeEnvironment = Callable[[], Environment]
