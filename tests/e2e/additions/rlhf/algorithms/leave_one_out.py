"""Leave-one-out: a sample is compared with the others of its group."""

import torch

from rlhf.algorithms.advantages import Credit, Rewarded


def leave_one_out(rewarded: Rewarded) -> Credit:
    """A sample's total reward less the mean of its group's others, at all of its actions; 0 where there are none."""
    totals_N, groups_N = rewarded.totals_N, rewarded.groups_N
    is_same_NN = groups_N[:, None] == groups_N
    others_N = is_same_NN.sum(1) - 1
    means_N = (torch.where(is_same_NN, totals_N, 0.0).sum(1) - totals_N) / others_N.clamp(min=1)
    advantages_N = torch.where(others_N > 0, totals_N - means_N, 0.0)
    return Credit(torch.where(rewarded.action_mask_NA, advantages_N[:, None], 0.0), None)
