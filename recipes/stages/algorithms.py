"""Algorithms of reinforcement learning: each is the class of its settings, and a member of a closed union."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Tag

from recipes.errors import FieldFinding, at
from recipes.fields import OneOf, TagAt, meaning
from recipes.problem_codes import Code
from recipes.stages.updates import Clipping, Comparisons, Critic, TokenUpdates, Updates


class Ppo(TokenUpdates, Clipping):
    """PPO (Schulman et al. 2017) on tokens: generalised advantage estimation with a critic."""

    name: Literal["ppo"] = meaning(description="Advantages: generalised advantage estimation with a critic.")
    gamma: float = meaning(1.0, gt=0, le=1, description="Discount.")
    lam: float = meaning(0.95, ge=0, le=1, alias="lambda", description="GAE's lambda.")
    critic: Critic = meaning(default_factory=Critic, description="The model of values.")

    @property
    def value_model(self) -> Critic:
        return self.critic

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.critic.warmup >= self.iterations:
            message = f"warmup must be below iterations ({self.iterations}); otherwise the actor never learns"
            yield at("algorithm.critic.warmup", self.critic.warmup, Code.WARMUP_TOO_LONG, message)

    def shrunk(self) -> Self:
        """The smoke form."""
        small = super().shrunk()
        return small.changed(critic=self.critic.changed(warmup=min(self.critic.warmup, small.iterations - 1)))


class Grpo(Comparisons, Clipping):
    """GRPO (Shao et al. 2024): a response's score against those of the prompt's other responses, without a critic.

    As published by default. Dr. GRPO (Liu et al. 2025): `scale: none, aggregation: constant`. DAPO (Yu et al. 2025):
    `aggregation: tokens, clip_high: 0.28, drop_equal_groups: true, drop_overlong: true, kl_coef: 0`.
    """

    name: Literal["grpo"] = meaning(description="Advantages: less the mean of the prompt's responses, by deviation.")
    scale: Literal["group", "batch", "none"] = meaning(
        "group",
        description="What differences to the prompt's mean are divided by: the deviation of the prompt's scores, that "
        "of all scores of the iteration, or nothing (Dr. GRPO).",
    )
    aggregation: Literal["tokens", "sequences", "constant"] = meaning(
        "sequences",
        description="What the loss is the mean of. sequences: responses, each the mean over its tokens. tokens: all "
        "tokens (DAPO). constant: the sum over tokens, divided by responses times max_new_tokens (Dr. GRPO).",
    )


class Gspo(Comparisons, Clipping):
    """GSPO (Zheng et al. 2025, arXiv 2507.18071): GRPO whose ratio is a response's, to the power of 1 / its length."""

    name: Literal["gspo"] = meaning(description="Advantages: as grpo; the ratio is the mean over a response's tokens.")
    clip_low: float = meaning(3e-4, gt=0, lt=1, description="Clip below 1 of a response's mean ratio.")
    clip_high: float = meaning(4e-4, gt=0, le=10, description="Clip above 1 of a response's mean ratio.")
    scale: Literal["group", "batch", "none"] = meaning(
        "group", description="What differences to the prompt's mean are divided by, as for grpo."
    )


class Cispo(Comparisons):
    """CISPO (MiniMax 2025, arXiv 2506.13585): bounds the weight of each token's gradient, and drops none."""

    name: Literal["cispo"] = meaning(description="Advantages: as grpo; REINFORCE with truncated ratios as weights.")
    max_ratio: float = meaning(5.0, gt=1, le=1000, description="Largest ratio that a token's gradient is weighted by.")
    scale: Literal["group", "batch", "none"] = meaning(
        "group", description="What differences to the prompt's mean are divided by, as for grpo."
    )


class Rloo(Comparisons, Clipping):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, equation 5): a response is one action, without a critic."""

    name: Literal["rloo"] = meaning(description="Advantages: less the mean of the prompt's other responses.")


class ReinforcePlusPlus(TokenUpdates, Clipping):
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): rewards from each token on, whitened, without a critic."""

    name: Literal["reinforce_plus_plus"] = meaning(description="Advantages: returns of tokens, whitened over all.")
    epochs: int = meaning(1, ge=1, le=100, description="Passes over an iteration's experience.")
    gamma: float = meaning(1.0, gt=0, le=1, description="Discount.")
    baseline: Literal["none", "group"] = meaning(
        "none",
        description="What is subtracted from a score first: nothing, or the mean of the prompt's responses "
        "(REINFORCE++-baseline).",
    )

    @property
    def compares_responses(self) -> bool:
        return self.baseline == "group"


class Ddpo(Updates, Clipping):
    """DDPO (Black et al. 2023): PPO's clipped policy gradient over denoising steps, without a critic."""

    name: Literal["ddpo"] = meaning(
        description="Advantages: an image's normalised reward, the same at all of its denoising steps."
    )
    epochs: int = meaning(1, ge=1, le=100, description="Passes over an iteration's experience.")
    kl_coef: float = meaning(
        0.0, ge=0, le=100, description="Weight of the KL against the start, summed over an image's denoising steps."
    )
    normalise: Literal["classes", "all"] = meaning(
        "classes",
        description="Whose mean and deviation in the iteration a reward is normalised by: its class's (or caption's), "
        "or all.",
    )
    advantage_clip: float = meaning(5.0, gt=0, le=1000, description="Advantages are clipped to plus or minus this.")
    grid: int = meaning(40, ge=0, le=1024, description="Images at fixed seeds shown in the report; 0: none.")

    def shrunk(self) -> Self:
        """The smoke form."""
        return self._shrunk(grid=10)


TextAlgorithm = Annotated[
    Annotated[Ppo, Tag("ppo")]
    | Annotated[Grpo, Tag("grpo")]
    | Annotated[Rloo, Tag("rloo")]
    | Annotated[Gspo, Tag("gspo")]
    | Annotated[Cispo, Tag("cispo")]
    | Annotated[ReinforcePlusPlus, Tag("reinforce_plus_plus")],
    OneOf(TagAt(("name",))),
]
"""How a policy that writes responses learns."""
ImageAlgorithm = Annotated[
    Annotated[Ddpo, Tag("ddpo")],
    OneOf(TagAt(("name",))),
]
"""How a policy that draws images learns."""
