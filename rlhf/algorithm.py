"""What an algorithm is: how actions get credit, which ratio is clipped, which losses; chosen by the recipe's keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from recipes.stages.algorithms import Ddpo, ImageAlgorithm, Ppo, TextAlgorithm
from recipes.stages.updates import Clipping, TokenUpdates
from rlhf.algorithms.advantages import CreditAssignment, Gae, GroupNormalised
from rlhf.algorithms.aggregation import Aggregation, token_mean
from rlhf.algorithms.filters import Filter
from rlhf.algorithms.kl import k2_penalty, k3_penalty
from rlhf.algorithms.losses import Surrogate, ValueLoss, clipped_surrogate, value_loss
from rlhf.algorithms.ratios import LogRatios, token_log_ratios


@dataclass(frozen=True)
class Algorithm:
    """One algorithm; what it has no use for is None or 0."""

    credit: CreditAssignment
    surrogate: Callable[[Tensor, Tensor], Surrogate]
    """Of log-ratios and advantages."""
    log_ratios: LogRatios = token_log_ratios
    aggregation: Aggregation = token_mean
    filters: Mapping[str, Filter] = field(default_factory=dict)
    """What the update leaves out, by name."""
    kl_penalty: Callable[[Tensor, Tensor, Tensor], Tensor] = k2_penalty
    """In the loss: of log-probabilities, those of the policy that sampled, and the reference's."""
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
                clipped(settings),
                kl_penalty=kl_penalty(settings),
                value_loss=partial(value_loss, clip=settings.critic.clip),
                value_coef=settings.critic.coef,
                entropy_coef=settings.entropy_coef,
            )
        case Ddpo():
            credit = GroupNormalised(settings.advantage_clip, by_group=settings.normalise == "classes")
            return Algorithm(credit, clipped(settings))


def clipped(settings: Clipping) -> Callable[[Tensor, Tensor], Surrogate]:
    """PPO's surrogate with the recipe's bounds."""
    low, high = settings.clip_low, settings.clip_high
    return partial(clipped_surrogate, clip_low=low, clip_high=high, dual_clip=settings.dual_clip)


def kl_penalty(settings: TokenUpdates) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The penalty in the loss whose gradient the recipe asks for."""
    return k3_penalty if settings.kl_estimator == "k3" else k2_penalty
