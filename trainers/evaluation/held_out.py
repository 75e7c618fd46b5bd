"""Held-out metrics of one model: weighted means over all ranks, and perplexity."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainers.data.dataset import Dataset
from trainers.objectives.protocol import Objective
from trainers.runtime import distributed


@torch.no_grad()
def evaluate(module: nn.Module, objective: Objective, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Return the weighted mean of each metric over the batches of all ranks, equally many on each.

    Fillers have no weight. The module is left in the mode that it was in.
    """
    was_training = module.training
    module.eval()
    sums: dict[str, float] = {}
    try:
        for batch in batches:
            for name, (value, weight) in objective.loss(module, batch.to(device)).metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                sums[f"{name}/weight"] = sums.get(f"{name}/weight", 0.0) + float(weight)
    finally:
        module.train(was_training)
    names = sorted(sums)
    totals = dict(zip(names, distributed.all_sum([sums[name] for name in names]), strict=True))
    means = {name: totals[name] / totals[f"{name}/weight"] for name in names if totals.get(f"{name}/weight")}
    if "loss" in means:
        means["targets"] = totals["loss/weight"]
    return means


def per_source(
    dataset: Dataset, rows: int, measure: Callable[[range, int], Mapping[str, float]], names: Sequence[str]
) -> dict[str, float]:
    """Return some metrics by source of a mixture, as `loss/dolly`; each of its part of `rows` rows. Collective.

    `measure` takes a source's rows, and how many of them to read.
    """
    sources = {name: own for name, own in dataset.by_source().items() if own}
    found: dict[str, float] = {}
    for name, own in sources.items():
        measured = measure(own, min(len(own), max(rows // len(sources), 1)))
        found |= {f"{metric}/{name}": measured[metric] for metric in names if metric in measured}
    return found


def perplexity(loss: float) -> float:
    """Return e to the mean negative log-likelihood, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
