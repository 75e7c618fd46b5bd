"""The one vocabulary of kinds: of what a stage makes or takes, and of the artifacts that hold it."""

from collections.abc import Collection
from typing import Literal, NewType

ImageKind = NewType("ImageKind", str)
"""A model of images, by the name of its family (`recipes/models/images/architecture.py`)."""
OutputKind = (
    Literal["model", "adapter", "reward_model", "critic", "report", "preferences", "tokenizer", "text_classifier"]
    | ImageKind
)
"""What an input can be: an output of a stage, or something from outside the recipe. `model`: a language model."""
ArtifactKind = (
    Literal[
        "model",
        "adapter",
        "reward_model",
        "actor_critic",
        "report",
        "preferences",
        "tokenizer",
        "dataset",
        "text_classifier",
    ]
    | ImageKind
)
"""The kind of an artifact in its manifest; `actor_critic` holds an actor and the critic that learned with it."""


def takes_tokenizer(wants: Collection[OutputKind]) -> bool:
    """Whether an input that wants these kinds takes a tokenizer, of whatever has one."""
    return "tokenizer" in wants
