"""What an action counts that another sampler drew than the policy that learns from it.

Shapes: N samples of all ranks, A actions.
"""

import torch
from torch import Tensor


@torch.no_grad()
def sampler_importance(logprobs_NA: Tensor, sampler_logprobs_NA: Tensor, bound: float) -> Tensor:
    """min(learner's / sampler's probability, bound) of each action: truncated importance sampling.

    Both are log-probabilities of the same weights, as two programs round them, or of weights some steps apart. Over
    what the sampler drew, the untruncated weight has mean 1, and the weighted gradient that of the policy itself;
    truncation trades a bias for a bounded variance (Ionides 2008; for samplers of language models Yao et al. 2025).
    """
    return (logprobs_NA.float() - sampler_logprobs_NA.float()).exp().clamp(max=bound)
