"""Estimators of KL(policy || reference) from the policy's own samples (Schulman 2020), and the penalty's controller.

`log_ratio` is log policy - log reference of the sampled token.
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus or minus this before exp."""


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased, of either sign: the log-ratio itself."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Biased, never negative, low variance: half the squared log-ratio."""
    return 0.5 * (logprobs - reference_logprobs) ** 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased and never negative: q/p - 1 - log(q/p) with p the policy and q the reference."""
    inverse = (reference_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.exp(inverse) - 1.0 - inverse


def k2_penalty(logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """A penalty for samples of `old_logprobs` whose value is k3 and whose gradient is that of KL(policy || reference).

    KL's gradient is E_policy[log(policy/reference) grad log policy]: that of k2, weighted by the ratio to the policy
    that sampled. k3's own gradient on own samples, E_policy[(1 - reference/policy) grad log policy], is that of
    KL(reference || policy): it keeps the policy from forgetting what the reference does, not from concentrating.
    """
    with torch.no_grad():
        ratio = torch.exp((logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        value, slope = ratio * k3(logprobs, reference_logprobs), ratio * k1(logprobs, reference_logprobs)
    return value + slope * (logprobs - logprobs.detach())


def k3_penalty(logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """k3 with its own gradient, the penalty of GRPO as it was published (Shao et al. 2024, equation 4).

    Its mean gradient on own samples is that of KL(reference || policy). It weighs no sample by its ratio: past the
    first step it is that of the policy which drew them, as in TRL and verl.
    """
    return k3(logprobs, reference_logprobs)


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL over the last dimension, in nats."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = torch.log_softmax(reference_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def adapted_kl_coef(kl_coef: float, measured_kl: float, target: float, horizon: int, num_samples: int) -> float:
    """The coefficient after `num_samples` responses: proportional control (Ziegler et al. 2019, section 2.2)."""
    error = min(max(measured_kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
