"""Losses of preference optimisation, per pair or per answer, from log-probabilities of whole answers.

Shapes: B pairs, or answers. A margin is the log-ratio of the policy to the reference of the chosen answer less that of
the rejected one: sums over an answer's tokens, or means where a length is normalised.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def logistic_loss(margin_B: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m): DPO (Rafailov et al. 2023, equation 7) where e is 0.

    With e the cross-entropy to labels that are swapped with that probability (Mitchell 2023, equation 3).
    """
    kept_B, swapped_B = logsigmoid(beta * margin_B), logsigmoid(-beta * margin_B)
    return -(1.0 - label_smoothing) * kept_B - label_smoothing * swapped_B


def robust_loss(margin_B: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e) (Chowdhury et al. 2024, equation 12).

    Its mean over labels swapped at the rate e is DPO's loss of the right labels.
    """
    kept_B, swapped_B = logsigmoid(beta * margin_B), logsigmoid(-beta * margin_B)
    return (-(1.0 - label_smoothing) * kept_B + label_smoothing * swapped_B) / (1.0 - 2.0 * label_smoothing)


def squared_loss(margin_B: Tensor, beta: float) -> Tensor:
    """(m - 1 / (2 beta))^2: IPO (Azar et al. 2023, equation 17, whose tau is beta)."""
    return (margin_B - 1.0 / (2.0 * beta)) ** 2


def hinge_loss(margin_B: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta m) (Liu et al. 2023, equation 10, whose gamma is beta)."""
    return torch.relu(1.0 - beta * margin_B)


def simpo_loss(mean_chosen_B: Tensor, mean_rejected_B: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (c - r) - gamma) of mean token log-probabilities (Meng et al. 2024, equation 6)."""
    return -logsigmoid(beta * (mean_chosen_B - mean_rejected_B) - gamma)


def log_odds(mean_logprob_B: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean token log-probability) (Hong et al. 2024, equation 4)."""
    return mean_logprob_B - log_complement(mean_logprob_B)


def log_complement(logprob_B: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by whichever of log1p and expm1 keeps its digits (Maechler 2012, equation 7).

    Probabilities that round to 1 count as the largest number below it.
    """
    below_B = logprob_B.clamp(max=-torch.finfo(logprob_B.dtype).eps)
    near_B = torch.log(-torch.expm1(below_B.clamp(min=-0.7)))
    far_B = torch.log1p(-torch.exp(below_B.clamp(max=-0.69)))
    return torch.where(below_B > -0.6931, near_B, far_B)


def orpo_loss(mean_chosen_B: Tensor, mean_rejected_B: Tensor, odds_weight: float) -> Tensor:
    """-c - lambda log sigmoid(log odds(c) - log odds(r)) of mean token log-probabilities (Hong et al. 2024, eq. 6)."""
    ratio_B = log_odds(mean_chosen_B) - log_odds(mean_rejected_B)
    return -mean_chosen_B - odds_weight * logsigmoid(ratio_B)


def kto_loss(
    log_ratio_B: Tensor, is_desirable_B: Tensor, kl: float, beta: float, weights: tuple[float, float]
) -> Tensor:
    """w (1 - sigmoid(beta (r - z))) of desirable answers, w (1 - sigmoid(beta (z - r))) of others, for log-ratios r.

    Ethayarajh et al. 2024, equations 7 and 8, without their constant: `kl` is the reference point z, not below 0;
    `weights` are those of desirable and of undesirable answers.
    """
    gain_B = torch.where(is_desirable_B, log_ratio_B - kl, kl - log_ratio_B)
    desirable, undesirable = log_ratio_B.new_tensor(weights)
    return torch.where(is_desirable_B, desirable, undesirable) * (1.0 - torch.sigmoid(beta * gain_B))
