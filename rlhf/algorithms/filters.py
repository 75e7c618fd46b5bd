"""Which samples an update leaves out; all are drawn, judged and compared, so that ranks and resumed stages stay alike.

Shapes: N samples of all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.algorithms.advantages import Rewarded

Filter = Callable[[Rewarded], Tensor]
"""True [N] where a sample is left out."""


def equal_groups(rewarded: Rewarded) -> Tensor:
    """Groups whose samples all have the same score: their advantages are 0 (DAPO, Yu et al. 2025, equation 11).

    DAPO draws further groups until the batch is full; here the mean is over what is left.
    """
    left_out_N = torch.zeros_like(rewarded.groups_N, dtype=torch.bool)
    for group in rewarded.groups_N.unique():
        rows_N = rewarded.groups_N == group
        scores = rewarded.scores_N[rows_N]
        left_out_N |= rows_N & (scores.max() == scores.min())
    return left_out_N


def overlong(rewarded: Rewarded) -> Tensor:
    """Samples that the length limit cut off: what their score says of them is noise (DAPO, section 3.4)."""
    return ~rewarded.ended_N
