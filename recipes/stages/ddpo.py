"""Reward-tuned diffusion: how images are drawn, and what rewards them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from recipes.errors import Finding
from recipes.fields import Strict, added_meaning, meaning, require_divides
from recipes.models.images.ddpm import Ddpm
from recipes.nearest import nearest
from recipes.problem_codes import Code
from recipes.smoke_sizes import BATCH, DENOISING_STEPS


@dataclass(frozen=True, slots=True)
class ActorFacts:
    """What is known of the diffusion model that is tuned."""

    settings: Ddpm
    is_captioned: bool
    classes: Sequence[str] = ()
    """Classes that it draws; none: it draws no classes, or they are not known."""

    @property
    def is_guidable(self) -> bool:
        """Whether it learned to do without its label or caption."""
        return self.settings.is_guidable or (self.is_captioned and self.settings.label_dropout > 0)


def unknown_class(name: str, known: Sequence[str]) -> Finding | None:
    """The rule that a class is one of those that are known; None: it is, or none are known."""
    if not known or name in known:
        return None
    guess = nearest(name, known)
    suggestion = f"did you mean {guess}?" if guess else "one of " + ", ".join(known[:32])
    return Finding(Code.UNKNOWN_CLASS, "no such class", suggestion)


class ImageRollout(Strict):
    """One iteration's experience: images, denoised step by step from noise by the ancestral sampler."""

    images_per_iteration: int = meaning(128, ge=2, le=10**6, description="Images per iteration over all workers.")
    samples_per_prompt: int = added_meaning(
        1,
        ge=1,
        le=1024,
        description="Of an actor that draws from captions: images of each caption that an iteration draws.",
    )
    steps: int | None = meaning(
        None,
        ge=2,
        le=10_000,
        description="Denoising steps of an image; all but the last are actions. null: the actor's sampling_steps.",
    )
    guidance: float | None = meaning(
        None, ge=0, le=100, description="Classifier-free guidance scale of the policy; null: the actor's, 1: none."
    )
    min_sd: float = meaning(
        0.01,
        ge=0,
        le=1,
        description="Smallest standard deviation of a denoising step, of pixels in [-1, 1]: below it a log-probability "
        "measures rounding rather than the policy.",
    )
    classes: list[str] = meaning(
        default_factory=list, description="Classes that are asked for in turn; none: all that the actor knows."
    )

    @model_validator(mode="after")
    def _whole_prompts(self) -> "ImageRollout":
        require_divides(self, "samples_per_prompt", "images_per_iteration")
        return self

    def shrunk(self) -> Self:
        """The smoke form."""
        images = min(self.images_per_iteration, max(2 * BATCH, 2 * len(self.classes)))
        is_smaller = images < self.images_per_iteration
        return self.changed(
            images_per_iteration=images,
            samples_per_prompt=min(self.samples_per_prompt, 2) if is_smaller else self.samples_per_prompt,
            steps=min(self.steps or DENOISING_STEPS, DENOISING_STEPS),
        )


class ClassReward(Strict):
    """The output of a frozen classifier for an image."""

    classifier: str = meaning(description="The classifier: a stage, or an address in the store.")
    label: str | None = meaning(None, description="The class whose probability counts; null: the one asked for.")
    value: Literal["probability", "log_probability"] = meaning(
        "log_probability", description="The reward of an image; the logarithm still tells apart what is sure already."
    )


class RuleReward(Strict):
    """A named rule on the pixels."""

    rule: Literal["ink", "symmetry", "compressibility"] = meaning(
        description="ink: mean of the pixels in [0, 1]; symmetry: mean likeness of a pixel and its mirror image, 1 "
        "where left and right agree; compressibility: minus the bits of each 8-bit pixel in zlib's best compression."
    )
    direction: Literal["more", "less"] = meaning("more", description="Whether more of it is rewarded, or less.")


def _reward_form(value: Any) -> str | None:
    """Which form is written: the one whose distinguishing key is there."""
    if isinstance(value, ClassReward | RuleReward):
        return "rule" if isinstance(value, RuleReward) else "classifier"
    if not isinstance(value, dict):
        return None
    return next((key for key in ("classifier", "rule") if key in value), None)


ImageReward = Annotated[
    Annotated[ClassReward, Tag("classifier")] | Annotated[RuleReward, Tag("rule")],
    Discriminator(
        _reward_form,
        custom_error_type="reward_form",
        custom_error_message="a reward of images is a mapping with `classifier: ...` (its output for them) or "
        "`rule: ...` (ink, symmetry, compressibility)",
    ),
]
