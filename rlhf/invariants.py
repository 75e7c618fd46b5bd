"""What must hold before anything is learnt, and between a policy and its samples; else the stage stops.

Rollouts are judged in the micro-batches of the first update, so both forwards are one program on the same rows: they
agree to the bit wherever the choice of a kernel follows from shapes alone, as on CPUs. Tolerated is what a kernel that
is chosen otherwise may do (for gradients, or for weights at another alignment in memory): round sums differently. So a
disagreement is counted in roundings, |difference| / (unit roundoff x scale), where the scale of a log-probability is
what one relative rounding of the model's output changes it by. Roundings of many layers mostly cancel: SmolLM2-135M
read in batches of entirely different shapes differs by 0.6 roundings on average in bf16, 9 at the 99 % quantile and 15
at most (fp32: 0.06, 1.2, 2.2). A wrong adapter, temperature, row or generation of weights moves the mean past that.
The mean and the quantile are bounded; the largest is logged, because a maximum grows with the number of tokens.
"""

import torch
from torch import Tensor

from recipes.errors import StageError
from trainers.inference.rollouts import WeightsVersion

MEAN_ROUNDINGS, RARE_ROUNDINGS = 2.0, 16.0
"""Most roundings on average, and at the quantile `RARE`."""
SAMPLER_ROUNDINGS = 16.0
"""Most on average between the learner and a sampler that is another program."""
RARE = 0.99


def require_version(found: WeightsVersion, wanted: WeightsVersion) -> None:
    """Stop the stage if samples were not drawn by the learner's present weights."""
    if found != wanted:
        raise StageError(
            f"rollouts come from the weights after {found.steps_applied} steps, for iteration {found.iteration}; "
            f"the learner is at step {wanted.steps_applied}, iteration {wanted.iteration}"
        )


def require_reference(logprobs_N: Tensor, reference_logprobs_N: Tensor, scales_N: Tensor, roundoff: float) -> None:
    """Stop the stage if actor and reference differ before anything was learnt."""
    _require_agreement(logprobs_N - reference_logprobs_N, scales_N, roundoff, "the actor is not its reference")


def require_ratio_one(log_ratios_N: Tensor, scales_N: Tensor, roundoff: float) -> None:
    """Stop the stage if the policy gives its own samples another probability before the first update on them."""
    _require_agreement(log_ratios_N, scales_N, roundoff, "the policy that samples and the one that learns disagree")


def require_sampler(log_ratios_N: Tensor, scales_N: Tensor, roundoff: float, version: WeightsVersion) -> None:
    """Stop the stage if another program than the learner's gives its samples probabilities of another policy.

    Its kernels, and adapters that are merged there and not here, round otherwise: the mean may be `SAMPLER_ROUNDINGS`.
    """
    mean = float((log_ratios_N.double().abs() / (roundoff * scales_N.double())).mean())
    if not mean <= SAMPLER_ROUNDINGS:  # nor NaN
        raise StageError(
            f"the sampler's log-probabilities are not those of the learner's weights of iteration {version.iteration}, "
            f"step {version.steps_applied}: they differ by {float(log_ratios_N.double().abs().mean()):.2e} on average, "
            f"{mean:.3g} roundings of {roundoff:.0e} (at most {SAMPLER_ROUNDINGS:g})"
        )


def token_scales(logprobs: Tensor) -> Tensor:
    """What one relative rounding of the logits changes a token's log-probability by: its own size, at least 1."""
    return 1.0 + logprobs.abs()


def density_scales(distances: Tensor, roundoff: float) -> Tensor:
    """What a relative rounding of a denoising step's mean changes its log-density by, over the unit roundoff.

    `distances` are norms d of the means in deviations. The log-density of mean + sd z changes by z . e - |e|^2 / 2
    where the mean is off by sd e, |e| = roundoff d: by about |e| and half its square.
    """
    return 1.0 + distances + 0.5 * roundoff * distances**2


@torch.no_grad()
def _require_agreement(differences_N: Tensor, scales_N: Tensor, roundoff: float, fault: str) -> None:
    """Raise StageError if log-probabilities that should be equal differ by more than roundings."""
    differences = differences_N.double().abs().reshape(-1)
    roundings = differences / (roundoff * scales_N.double().reshape(-1))
    mean = float(roundings.mean())
    rare = float(roundings.sort().values[int(RARE * (len(roundings) - 1))])
    if not (mean <= MEAN_ROUNDINGS and rare <= RARE_ROUNDINGS):  # nor NaN
        raise StageError(
            f"{fault}: their log-probabilities differ by up to {float(differences.max()):.2e}; in roundings of "
            f"{roundoff:.0e} that is {mean:.3g} on average (at most {MEAN_ROUNDINGS:g}) and {rare:.3g} at the "
            f"{RARE:.0%} quantile (at most {RARE_ROUNDINGS:g})"
        )
