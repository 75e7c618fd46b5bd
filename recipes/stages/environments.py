"""Environments that a policy acts in over several turns: a closed union, and what all of them answer."""

from typing import Annotated, Literal

from pydantic import Field

from recipes.fields import Strict, meaning

TERM = "environment"
"""The term of a reward that an environment gives."""


class AnyEnvironment(Strict):
    """Where the policy's turns go: each is answered by an observation, until there is nothing to answer."""

    turns: int = meaning(4, ge=2, le=1000, description="Most turns of the policy.")
    max_observation_tokens: int = meaning(
        64, ge=1, le=10**6, description="Longest observation in tokens, with what the chat template puts around it."
    )
    role: Literal["user", "tool"] = meaning(
        "user", description="Of observations in a conversation; after a prompt of plain text they are appended as text."
    )
    weight: float = meaning(
        1.0, ge=-1000, le=1000, description="Factor of the rewards that the environment itself gives, in the score."
    )

    @property
    def carried(self) -> tuple[str, ...]:
        """Columns of a prompt's row that it reads."""
        return ()

    def longest(self, turn: int) -> int:
        """Most tokens of a conversation whose turns have at most so many, without its prompt."""
        return self.turns * turn + (self.turns - 1) * self.max_observation_tokens


class Tool(AnyEnvironment):
    """An environment that answers calls: a turn without a call is the policy's answer, and the last one.

    It gives no reward: what an answer is worth the stage's `rewards` say, which read the last turn.
    """

    opening: str = meaning("<call>", min_length=1, description="What a call begins with, in the policy's turn.")
    closing: str = meaning(
        "</call>", min_length=1, description="What it ends with, at the latest with the turn; the last call counts."
    )
    shown: str = meaning("{}", pattern=r"^[^{}]*\{\}[^{}]*$", description="The observation; {} is the tool's answer.")

    def call(self, turn: str) -> str | None:
        """What is called in a turn; None: nothing is."""
        _, found, called = turn.rpartition(self.opening)
        return called.partition(self.closing)[0].strip() if found else None

    def observation(self, answer: str) -> str:
        """What the policy observes."""
        return self.shown.replace("{}", answer)


class CalculatorEnvironment(Tool):
    """Exact arithmetic on whole numbers, decimals and fractions: + - * / // % ** and brackets."""

    name: Literal["calculator"] = meaning(description="A calculator with exact answers.")


class PythonDocsEnvironment(Tool):
    """What Python's documentation says of a module, a class or a function of the standard library."""

    name: Literal["python_docs"] = meaning(description="Python's documentation of a name, as str.join.")


class CodeEnvironment(AnyEnvironment):
    """An environment whose code the recipe only names: a class or function that makes one."""

    columns: list[str] = meaning(
        default_factory=list, description="Columns of the prompt's row that are handed over with each conversation."
    )
    version: int = meaning(
        1, ge=1, le=10**9, description="Raise it where what is named behaves otherwise: its code is not fingerprinted."
    )

    @property
    def carried(self) -> tuple[str, ...]:
        return tuple(self.columns)


class PythonEnvironment(CodeEnvironment):
    """One that a module makes: an installed one, or one in the recipe's folder."""

    name: Literal["python"] = meaning(description="Your own, by module:class.")
    python: str = meaning(
        pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", description="module:class, or module:function."
    )


class EntryPointEnvironment(CodeEnvironment):
    """One that an installed package has under `trainwright.environments`."""

    name: Literal["entry_point"] = meaning(description="One of an installed package.")
    entry_point: str = meaning(
        min_length=1, description="Name of the entry point in the group trainwright.environments."
    )


Environment = Annotated[
    CalculatorEnvironment | PythonDocsEnvironment | PythonEnvironment | EntryPointEnvironment,
    Field(discriminator="name"),
]
