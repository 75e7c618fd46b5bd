"""What is watched in every PPO iteration, and the rule that ends a stage before a collapse.

Shapes: N responses of all ranks, R response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rlhf.algorithms.importance import sampler_importance
from rlhf.algorithms.kl import k1, k3
from rlhf.comparison import correlation, distinct_n, repeated_share
from trainers.evaluation.image_metrics import vendi_score

KEPT_ITERATIONS = 5


def kept_iterations(iterations: int) -> frozenset[int]:
    """Iterations that the report shows samples of, and KL without a weight; the first and the last among them."""
    return frozenset(round(iterations * place / (KEPT_ITERATIONS - 1)) for place in range(KEPT_ITERATIONS))


class Report(Protocol):
    """One iteration's rollouts in numbers, over all ranks."""

    @property
    def score_mean(self) -> float:
        """Of the scores as the reward gave them."""

    @property
    def optimised_score(self) -> float:
        """Mean of the scores as the policy learns them: the best policy under a stop rule is the best by this."""

    @property
    def kl(self) -> float | None:
        """Of the policy against its start, in nats for a whole sample; None: the reference was not asked."""

    @property
    def kl_alarm(self) -> bool:
        """Whether sampling and log-probabilities disagree."""

    def metrics(self) -> dict[str, float]:
        """The numbers by their names in the run's metrics; `score_mean`, `score_std` and `kl` among them."""


@dataclass(frozen=True)
class RolloutReport:
    """One iteration's rollouts in numbers, over all ranks; KL in nats per response."""

    score_mean: float
    score_std: float
    kl: float | None
    """None, as `kl_k3`: the reference was not asked."""
    kl_k3: float | None
    entropy: float | None
    """None, as the sampler's gaps: the policy was not asked before the update, whose first step tells them."""
    length_mean: float
    eos_rate: float
    distinct_2: float
    repetition: float
    length_correlation: float
    """Of score and length: near 1 the reward model pays for length alone."""
    shaped_score_mean: float
    """Of the scores normalised, clipped and less the penalty for a missing end token."""
    sampler_gap: float | None
    """Mean absolute log-ratio of the training forward to the sampler at the drawn tokens: the two round differently."""
    sampler_gap_max: float | None
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Mean of what each term of the reward gave, by its name."""
    turns_mean: float | None = None
    """Of the policy, in a conversation with an environment; None: responses are single turns."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """`importance_mean` of the truncated weights, and the share that is `importance_truncated`, where others sample."""

    @property
    def optimised_score(self) -> float:
        """The shaped one."""
        return self.shaped_score_mean

    def metrics(self) -> dict[str, float]:
        """The numbers by their names in the run's metrics; a term's as `reward/NAME`."""
        numbers = {
            name: value for name, value in vars(self).items() if not isinstance(value, Mapping) and value is not None
        }
        return {**numbers, **{f"reward/{name}": mean for name, mean in self.rewards.items()}, **self.importance}

    @property
    def kl_alarm(self) -> bool:
        """Alarm: a mean k1 well below 0 means that sampling and log-probabilities disagree."""
        if self.kl is None or self.kl_k3 is None:
            return False
        return self.kl < -0.05 * max(1.0, self.length_mean) ** 0.5 and self.kl < -self.kl_k3


def report_rollouts(
    scores_N: Tensor,
    responses: Sequence[Sequence[int]],
    response_mask_NR: Tensor,
    ended_N: Tensor,
    logprobs_NR: Tensor | None,
    reference_logprobs_NR: Tensor | None,
    entropy_NR: Tensor | None,
    *,
    by_term: Mapping[str, Tensor],
    shaped_scores_N: Tensor,
    sampler_logprobs_NR: Tensor,
    turns: Sequence[int] | None = None,
    max_importance: float | None = None,
) -> RolloutReport:
    """Numbers of one iteration from every rank's rollouts; `scores_N` as the reward's terms gave them."""
    mask, importance = response_mask_NR, {}
    if max_importance is not None:
        assert logprobs_NR is not None
        factors = sampler_importance(logprobs_NR, sampler_logprobs_NR, max_importance)[mask].double()
        truncated = float((factors >= max_importance).double().mean())
        importance = {"importance_mean": float(factors.mean()), "importance_truncated": truncated}

    def per_response(estimator: Callable[[Tensor, Tensor], Tensor]) -> float | None:
        if logprobs_NR is None or reference_logprobs_NR is None:
            return None
        return float(estimator(logprobs_NR, reference_logprobs_NR)[mask].double().sum() / len(scores_N))

    gaps = None if logprobs_NR is None else (logprobs_NR - sampler_logprobs_NR)[mask].abs().double()
    lengths = mask.sum(dim=1)
    scores = scores_N.double()
    return RolloutReport(
        score_mean=float(scores.mean()),
        score_std=float(scores.std(correction=0)),
        kl=per_response(k1),
        kl_k3=per_response(k3),
        entropy=None if entropy_NR is None else float(entropy_NR[mask].double().mean()),
        length_mean=float(lengths.double().mean()),
        eos_rate=float(ended_N.double().mean()),
        distinct_2=distinct_n(responses, 2),
        repetition=repeated_share(responses),
        length_correlation=correlation(scores.tolist(), lengths.double().tolist()),
        shaped_score_mean=float(shaped_scores_N.double().mean()),
        sampler_gap=None if gaps is None else float(gaps.mean()),
        sampler_gap_max=None if gaps is None else float(gaps.max()),
        rewards={name: float(values_N.double().mean()) for name, values_N in by_term.items()},
        turns_mean=None if turns is None else sum(turns) / len(turns),
        importance=importance,
    )


def broken_rule(report: Report, kl_limit: float | None) -> str | None:
    """Name of the stop rule that these rollouts break."""
    return "kl_limit" if kl_limit is not None and report.kl is not None and report.kl > kl_limit else None


VENDI_IMAGES = 256
"""Most images that the diversity of an iteration is measured on."""


@dataclass(frozen=True)
class ImageRolloutReport:
    """One iteration's images in numbers, over all ranks; KL in nats per image."""

    score_mean: float
    score_std: float
    kl: float | None
    """Exact, summed over the denoising steps; None, as `kl_k1`: the reference was not asked."""
    kl_k1: float | None
    """Estimated from what was drawn: near `kl` where the policy drew it."""
    vendi: float
    """Effective number of different images: it falls where the policy collapses."""
    images: int

    @property
    def optimised_score(self) -> float:
        """The reward itself."""
        return self.score_mean

    def metrics(self) -> dict[str, float]:
        """The numbers by their names in the run's metrics."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def kl_alarm(self) -> bool:
        """Alarm: of the policy's own images the mean k1 has the exact KL as mean and 2 KL / images as variance."""
        if self.kl is None or self.kl_k1 is None:
            return False
        return abs(self.kl_k1 - self.kl) > 5 * (2 * self.kl / self.images) ** 0.5 + 0.01


def report_images(
    scores_N: Tensor, images_NCHW: Tensor, logprobs_NA: Tensor, reference_logprobs_NA: Tensor | None, kl_NA: Tensor
) -> ImageRolloutReport:
    """Numbers of one iteration from every rank's images and their actions' log-probabilities and KL."""
    scores, kl, kl_k1 = scores_N.double(), None, None
    if reference_logprobs_NA is not None:
        kl = float(kl_NA.double().sum() / len(scores))
        kl_k1 = float(k1(logprobs_NA, reference_logprobs_NA).double().sum() / len(scores))
    return ImageRolloutReport(
        score_mean=float(scores.mean()),
        score_std=float(scores.std(correction=0)),
        kl=kl,
        kl_k1=kl_k1,
        vendi=vendi_score(images_NCHW[:VENDI_IMAGES].float().cpu().numpy()),
        images=len(scores),
    )
