"""What algorithms of reinforcement learning share: iterations, penalty, clipping, optimiser, filters."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from recipes.errors import FieldFinding, at
from recipes.fields import Iterations, Strict, added_meaning, meaning, placement
from recipes.problem_codes import Code
from recipes.smoke_sizes import ITERATIONS, SEQUENCE
from recipes.stages.optim import AdamW, Schedule


class Critic(Strict):
    """A model of the values of states, which learns next to the policy on one joint loss."""

    start: Literal["actor", "reward"] | None = meaning(
        None,
        description="Which model initialises the critic: the stage's actor or its reward model; null: the reward model "
        "where the reward has one.",
    )
    lr: float | None = meaning(None, gt=0, le=10, description="The critic's learning rate; null: the actor's.")
    warmup: int = meaning(0, ge=0, le=10**6, description="First iterations in which only the critic learns.")
    clip: float | None = meaning(0.2, gt=0, le=100, description="Clip of the value update; null: no clip.")
    coef: float = meaning(0.5, gt=0, le=100, description="Weight of the value loss in the joint loss.")


class FixedKl(Strict):
    """A constant KL coefficient."""

    name: Literal["fixed"] = meaning("fixed", description="kl_coef stays what it is.")


class AdaptiveKl(Strict):
    """Proportional controller (Ziegler et al. 2019, section 2.2)."""

    name: Literal["adaptive"] = meaning(description="kl_coef follows the measured KL.")
    target: float = meaning(gt=0, le=1000, description="Wanted KL per response, in nats.")
    horizon: int = meaning(10_000, ge=1, le=10**12, description="Samples over which the coefficient adapts.")


KlController = Annotated[FixedKl | AdaptiveKl, Field(discriminator="name")]


class Updates(Strict):
    """What every algorithm shares: iterations of rollouts, and updates on what they gave."""

    iterations: int = meaning(ge=1, le=10**9, description="Rollout + update cycles.")
    epochs: int = meaning(2, ge=1, le=100, description="Passes over an iteration's experience.")
    mini_batches: int = meaning(2, ge=1, le=4096, description="Optimiser steps per pass.")
    kl_coef: float = meaning(
        0.05, ge=0, le=100, description="Weight of the KL penalty against the reference, per token or denoising step."
    )
    kl_in: Literal["reward", "loss"] = meaning(
        "reward",
        description="Where the penalty enters. reward: k1 of each token, or the KL of an image's steps, is subtracted "
        "from the score. loss: the KL at each token or step is added to the loss. kl_coef weighs nats against the "
        "score in both, except for images in the loss: there against the reward's standard deviation.",
    )
    kl_controller: KlController = meaning(default_factory=FixedKl, description="How kl_coef changes over time.")
    kl_limit: float | None = meaning(
        None,
        gt=0,
        le=10**4,
        description="Stop rule: mean KL per response or image in nats above which the stage stops at its best state.",
    )
    optimizer: AdamW = meaning(description="The actor's optimiser.")
    schedule: Schedule = meaning(
        default_factory=lambda: Schedule(name="constant"), description="Learning-rate schedule over optimiser steps."
    )
    gradient_clipping: float = meaning(1.0, gt=0, le=10**6, description="Largest global gradient norm.")
    max_skipped_steps: int = meaning(3, ge=0, le=10**6, description="Skipped non-finite steps before the stage fails.")
    save_every: Iterations = placement(
        10,
        description="Iterations (a rollout and its epochs x mini_batches steps) between two commits of resumable "
        "state; the last one is always saved.",
    )

    def rules(self) -> Iterator[FieldFinding]:
        """A warm-up past the last step, and a controller that has nothing to multiply."""
        steps, warmup = self.planned_steps, self.schedule.warmup_steps
        if warmup >= steps:
            message = (
                f"warmup_steps must be below the stage's {steps} steps (iterations {self.iterations} x epochs "
                f"{self.epochs} x mini_batches {self.mini_batches})"
            )
            yield at("algorithm.schedule.warmup_steps", warmup, Code.WARMUP_TOO_LONG, message)
        if self.kl_controller.name == "adaptive" and self.kl_coef == 0:
            message = "an adaptive controller multiplies kl_coef, which is 0 and would stay 0"
            yield at(
                "algorithm.kl_coef", self.kl_coef, Code.UNMET_REQUIREMENT, message, "start above 0, for example 0.05"
            )

    @property
    def value_model(self) -> "Critic | None":
        """The critic that learns next to the policy; None: the algorithm has none."""
        return None

    @property
    def compares_responses(self) -> bool:
        """Whether an advantage is a difference to the other responses to the same prompt."""
        return False

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.epochs * self.mini_batches

    @property
    def planned_steps(self) -> int:
        """Optimiser steps of all iterations."""
        return self.iterations * self.steps_per_iteration

    def _shrunk(self, **changes: Any) -> Self:
        iterations = min(self.iterations, ITERATIONS)
        epochs, mini_batches = min(self.epochs, 2), min(self.mini_batches, 2)
        steps = iterations * epochs * mini_batches
        return self.changed(
            iterations=iterations,
            epochs=epochs,
            mini_batches=mini_batches,
            kl_limit=None,
            schedule=self.schedule.changed(warmup_steps=min(self.schedule.warmup_steps, steps // 4)),
            save_every=1,
            **changes,
        )


class Clipping(Strict):
    """Bounds of the ratio in PPO's surrogate (Schulman et al. 2017, equation 7)."""

    clip_low: float = meaning(0.2, gt=0, lt=1, description="Ratio clip below 1.")
    clip_high: float = meaning(0.2, gt=0, le=10, description="Ratio clip above 1.")
    dual_clip: float | None = meaning(
        None, gt=1, le=100, description="Lower bound factor for negative advantages (Ye et al. 2020)."
    )


class TokenUpdates(Updates):
    """What every algorithm on responses shares: actions are tokens, and a reward model scores whole responses."""

    kl_estimator: Literal["k1", "k2", "k3"] | None = added_meaning(
        None,
        description="Of the penalty. In the reward k1, the one whose value has the right gradient. In the loss k2, the "
        "gradient of KL(policy || reference), or k3, that of KL(reference || policy), as GRPO was published. null: k1 "
        "in the reward, k2 in the loss.",
    )
    entropy_coef: float = meaning(0.0, ge=0, le=10, description="Weight of the entropy bonus.")
    text_coef: float = meaning(
        0.0,
        ge=0,
        le=1000,
        description="Weight of the language-model loss on the stage's `text` (Ouyang et al. 2022, eq. 2).",
    )
    text_batch: int = meaning(8, ge=1, le=10**6, description="Sequences of `text` per optimiser step over all workers.")
    text_length: int = meaning(128, ge=8, le=10**7, description="Tokens per sequence of `text`.")
    missing_eos_penalty: float = meaning(
        1.0, ge=0, le=1000, description="Subtracted from the score of a response without an end token."
    )

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        estimator = self.kl_estimator
        if self.kl_in == "reward" and estimator in ("k2", "k3"):
            message = f"{estimator} in the reward also charges tokens that became rarer, which drives them further down"
            yield at("algorithm.kl_estimator", estimator, Code.CONFLICTING_KEYS, message, "k1, or kl_in: loss")
        if self.kl_in == "loss" and estimator == "k1":
            message = "the mean gradient of k1 is zero: in the loss it holds nothing"
            yield at("algorithm.kl_estimator", estimator, Code.CONFLICTING_KEYS, message, "k2 or k3, or kl_in: reward")

    def shrunk(self) -> Self:
        """The smoke form."""
        return self._shrunk(text_batch=min(self.text_batch, 4), text_length=min(self.text_length, SEQUENCE))


class Comparisons(TokenUpdates):
    """What algorithms share that compare the responses to one prompt instead of asking a critic."""

    epochs: int = meaning(1, ge=1, le=100, description="Passes over an iteration's experience.")
    kl_in: Literal["reward", "loss"] = meaning(
        "loss",
        description="Where the penalty enters. loss: the KL at each token is added to the loss, and kl_coef weighs "
        "nats against advantages as they are scaled. reward: k1 of all tokens is subtracted from a response's score "
        "before responses are compared.",
    )
    drop_equal_groups: bool = meaning(
        False,
        description="Leave prompts out of the update whose responses all have the same score (DAPO's filter, without "
        "drawing others in their place).",
    )
    drop_overlong: bool = meaning(
        False, description="Leave responses out of the update that the length limit cut off (DAPO)."
    )

    @property
    def compares_responses(self) -> bool:
        return True
