"""What an algorithm is: how actions get credit, which ratio is clipped, which losses; chosen by the recipe's keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from recipes.stages.algorithms import Ddpo, ImageAlgorithm, Ppo, TextAlgorithm, Updates
from rlhf.algorithms.advantages import CreditAssignment, Gae, GroupNormalised
from rlhf.algorithms.losses import PolicyLoss, ValueLoss, policy_loss, token_log_ratios, value_loss

LogRatios = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From log-probabilities, those of the policy that sampled, and the action mask to the log-ratios of all actions."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm; what it has no use for is None or 0."""

    credit: CreditAssignment
    policy_loss: Callable[[Tensor, Tensor, Tensor], PolicyLoss]
    """Of log-ratios, advantages and action mask."""
    log_ratios: LogRatios = token_log_ratios
    value_loss: Callable[[Tensor, Tensor, Tensor, Tensor], ValueLoss] | None = None
    """Of values, those before the update, returns and action mask."""
    value_coef: float = 0.0
    entropy_coef: float = 0.0

    @property
    def needs_critic(self) -> bool:
        """Whether a critic learns next to the policy."""
        return self.value_loss is not None


def algorithm_of(settings: TextAlgorithm | ImageAlgorithm) -> Algorithm:
    """The algorithm with these settings."""
    match settings:
        case Ppo():
            return Algorithm(
                Gae(settings.gamma, settings.lam),
                clipped_surrogate(settings),
                value_loss=partial(value_loss, clip=settings.critic.clip),
                value_coef=settings.critic.coef,
                entropy_coef=settings.entropy_coef,
            )
        case Ddpo():
            credit = GroupNormalised(settings.advantage_clip, by_group=settings.normalise == "classes")
            return Algorithm(credit, clipped_surrogate(settings))


def clipped_surrogate(settings: Updates) -> Callable[[Tensor, Tensor, Tensor], PolicyLoss]:
    """PPO's surrogate with the recipe's bounds."""
    low, high = settings.clip_low, settings.clip_high
    return partial(policy_loss, clip_low=low, clip_high=high, dual_clip=settings.dual_clip)
