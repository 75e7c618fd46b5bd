"""What an environment is: it is told a prompt's row, then answers the policy's turns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from recipes.stages.rewards.term import Row


@dataclass(frozen=True)
class Step:
    """What a turn of the policy led to."""

    observation: str = ""
    """What the policy is told next."""
    reward: float = 0.0
    """Of the turn."""
    done: bool = False
    """Whether the turn was the last one: then nobody reads the observation."""


class Environment(Protocol):
    """One conversation; each sample has one of its own."""

    def reset(self, row: Row) -> str:
        """Begin with the columns of the prompt's row; returns what the policy is told before its first turn, if any."""

    def step(self, action: str) -> Step:
        """Answer a turn of the policy, given as its text."""


MakeEnvironment = Callable[[], Environment]
