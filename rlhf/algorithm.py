"""What an algorithm is: how actions get credit, which ratio is clipped, which losses; chosen by the recipe's keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from recipes.stages.algorithms import (
    Cispo,
    Ddpo,
    Grpo,
    Gspo,
    ImageAlgorithm,
    Ppo,
    ReinforcePlusPlus,
    Rloo,
    TextAlgorithm,
)
from recipes.stages.updates import Clipping, Comparisons, TokenUpdates
from rlhf.algorithms.advantages import (
    CreditAssignment,
    Gae,
    GroupNormalised,
    GroupRelative,
    WhitenedReturns,
    leave_one_out,
)
from rlhf.algorithms.aggregation import Aggregation, constant_length, sequence_mean, token_mean
from rlhf.algorithms.filters import Filter, equal_groups, overlong
from rlhf.algorithms.kl import k2_penalty, k3_penalty
from rlhf.algorithms.losses import Surrogate, ValueLoss, clipped_surrogate, truncated_importance, value_loss
from rlhf.algorithms.ratios import LogRatios, mean_log_ratios, product_log_ratios, token_log_ratios


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


def algorithm_of(settings: TextAlgorithm | ImageAlgorithm, nominal_length: int = 1) -> Algorithm:
    """The algorithm with these settings; `nominal_length` is what a sample's actions may be divided by."""
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
        case Grpo():
            aggregations: dict[str, Aggregation] = {
                "tokens": token_mean,
                "sequences": sequence_mean,
                "constant": partial(constant_length, length=nominal_length),
            }
            aggregation, compare = aggregations[settings.aggregation], GroupRelative(settings.scale)
            return compared(settings, compare, clipped(settings), aggregation=aggregation)
        case Gspo():
            compare = GroupRelative(settings.scale)
            return compared(settings, compare, clipped(settings), mean_log_ratios, sequence_mean)
        case Cispo():
            surrogate = partial(truncated_importance, max_ratio=settings.max_ratio)
            return compared(settings, GroupRelative(settings.scale), surrogate)
        case Rloo():
            return compared(settings, leave_one_out, clipped(settings), product_log_ratios, sequence_mean)
        case ReinforcePlusPlus():
            returns = WhitenedReturns(settings.gamma, by_group=settings.baseline == "group")
            penalty, entropy_coef = kl_penalty(settings), settings.entropy_coef
            return Algorithm(returns, clipped(settings), kl_penalty=penalty, entropy_coef=entropy_coef)
        case Ddpo():
            credit = GroupNormalised(settings.advantage_clip, by_group=settings.normalise == "classes")
            return Algorithm(credit, clipped(settings))


def compared(
    settings: Comparisons,
    credit: CreditAssignment,
    surrogate: Callable[[Tensor, Tensor], Surrogate],
    log_ratios: LogRatios = token_log_ratios,
    aggregation: Aggregation = token_mean,
) -> Algorithm:
    """An algorithm that compares responses to one prompt, with what the recipe says of penalty, entropy and filters."""
    filters: dict[str, Filter] = {"equal_groups": equal_groups} if settings.drop_equal_groups else {}
    filters |= {"overlong": overlong} if settings.drop_overlong else {}
    penalty, entropy_coef = kl_penalty(settings), settings.entropy_coef
    return Algorithm(credit, surrogate, log_ratios, aggregation, filters, penalty, entropy_coef=entropy_coef)


def clipped(settings: Clipping) -> Callable[[Tensor, Tensor], Surrogate]:
    """PPO's surrogate with the recipe's bounds."""
    low, high = settings.clip_low, settings.clip_high
    return partial(clipped_surrogate, clip_low=low, clip_high=high, dual_clip=settings.dual_clip)


def kl_penalty(settings: TokenUpdates) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The penalty in the loss whose gradient the recipe asks for."""
    return k3_penalty if settings.kl_estimator == "k3" else k2_penalty
