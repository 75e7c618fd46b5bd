"""The closed union of the kinds of stage, and the version of each kind's mathematics."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from recipes.fields import TagAt
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune, FinetuneImages
from recipes.stages.pretrain import Pretrain, PretrainImages
from recipes.stages.reward import Reward
from recipes.stages.rl import PpoImages, PpoStage

PretrainFamily = Annotated[
    Annotated[Pretrain, Tag("decoder")]
    | Annotated[Pretrain, Tag("encoder")]
    | Annotated[Pretrain, Tag("encoder_decoder")]
    | Annotated[Pretrain, Tag("rnn")]
    | Annotated[PretrainImages, Tag("classifier")]
    | Annotated[PretrainImages, Tag("vae")]
    | Annotated[PretrainImages, Tag("gan")]
    | Annotated[PretrainImages, Tag("ddpm")],
    Discriminator(TagAt(("architecture", "family"), instead=("init_from", "decoder"))),
]
"""What trains each family; `init_from` without an architecture goes on from a language model."""

FinetuneFamily = Annotated[
    Annotated[Finetune, Tag("text")] | Annotated[FinetuneImages, Tag("ddpm")],
    Discriminator(TagAt(("family",), default="text")),
]
"""What tunes each family; language models tell theirs themselves."""

PpoEstimator = Annotated[
    Annotated[PpoStage, Tag("gae")] | Annotated[PpoImages, Tag("ddpo")],
    Discriminator(TagAt(("ppo", "estimator"), default="gae")),
]
"""One algorithm, and what its samples are: responses, or pictures."""

Stage = Annotated[PretrainFamily | FinetuneFamily | Reward | PpoEstimator | Evaluate, Field(discriminator="kind")]

SEMANTICS = {"pretrain": 3, "finetune": 4, "reward": 3, "ppo": 4, "evaluate": 5}
"""Version of each kind's mathematics; part of the fingerprint, raised when the mathematics is mended."""
