"""The closed union of the kinds of stage, and the version of each kind's mathematics."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Discriminator, Field, Tag

from recipes.fields import TagAt
from recipes.models.decoder import DECODER
from recipes.models.families import BUILT_FAMILIES
from recipes.models.images.architecture import IMAGE_FAMILIES
from recipes.stages.algorithms import ImageAlgorithm, TextAlgorithm
from recipes.stages.answers import Counted
from recipes.stages.base import StageBase
from recipes.stages.evaluate import Evaluate
from recipes.stages.feedback import Feedback
from recipes.stages.finetune import Finetune, FinetuneImages
from recipes.stages.preference import Preference
from recipes.stages.pretrain import Pretrain, PretrainImages
from recipes.stages.reward import Reward
from recipes.stages.rl import RlText
from recipes.stages.rl_images import RlImages


def members(union: Any) -> Iterator[type[StageBase]]:
    """The classes of a union, also of those that are its members."""
    if isinstance(union, type):
        yield union
    else:
        for member in get_args(union):
            yield from members(member)


def _names(algorithms: Any) -> Iterator[str]:
    """The names by which the algorithms of a union are chosen."""
    for algorithm in members(algorithms):
        yield from get_args(algorithm.model_fields["name"].annotation)


if TYPE_CHECKING:
    PretrainFamily = Pretrain | PretrainImages
else:
    PretrainFamily = Annotated[
        Union[
            *(Annotated[Pretrain, Tag(family)] for family in BUILT_FAMILIES),
            *(Annotated[PretrainImages, Tag(family)] for family in IMAGE_FAMILIES),
        ],
        Discriminator(TagAt(("architecture", "family"), instead=("init_from", DECODER.name))),
    ]
"""What trains each family; `init_from` without an architecture continues from a language model."""

FinetuneFamily = Annotated[
    Annotated[Finetune, Tag("text")] | Annotated[FinetuneImages, Tag("ddpm")],
    Discriminator(TagAt(("family",), default="text")),
]
"""What tunes each family; the family of a language model follows from its files."""

if TYPE_CHECKING:
    RlMedium = RlText | RlImages
else:
    RlMedium = Annotated[
        Union[
            *(Annotated[RlText, Tag(name)] for name in _names(TextAlgorithm)),
            *(Annotated[RlImages, Tag(name)] for name in _names(ImageAlgorithm)),
        ],
        Discriminator(TagAt(("algorithm", "name"))),
    ]
"""What the samples of each algorithm are: responses, or images."""

Stage = Annotated[
    PretrainFamily | FinetuneFamily | Reward | Preference | RlMedium | Feedback | Evaluate, Field(discriminator="kind")
]

STAGE_CLASSES: tuple[type[StageBase], ...] = tuple(dict.fromkeys(members(Stage)))

SHOWN_METRICS = tuple(dict.fromkeys(name for stage in STAGE_CLASSES for name in stage.shown))
"""What a person sees of any stage while it runs."""
COUNTED: tuple[Counted, ...] = get_args(Counted)


def _classes_of(kind: str) -> list[type[StageBase]]:
    return [stage for stage in STAGE_CLASSES if get_args(stage.model_fields["kind"].annotation) == (kind,)]


def first_curves(kind: str) -> tuple[str, ...]:
    """The curves that a reader looks for in the report of a stage of a kind."""
    return tuple(dict.fromkeys(name for stage in _classes_of(kind) for name in stage.curves))


def compares_models(kind: str) -> bool:
    """Whether the result of a stage of a kind is a report on models."""
    return any(stage.compares_models for stage in _classes_of(kind))


SEMANTICS = {"pretrain": 3, "finetune": 5, "reward": 3, "preference": 1, "rl": 5, "feedback": 1, "evaluate": 7}
"""Version of each kind's mathematics; part of the fingerprint, raised when the mathematics changes."""
