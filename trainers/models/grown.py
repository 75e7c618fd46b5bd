"""Models changed before they are trained: rows for new tokens, and parameters that stay as they are."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from recipes.errors import RequestError


@torch.no_grad()
def add_tokens(model: Any, first: int, total: int) -> None:
    """Make the rows of ids from `first` to `total` the mean of those before, in the embedding and in the head.

    Rows that the model lacks are added; those that it has beyond its tokens are taken first.
    """
    if total > len(model.get_input_embeddings().weight):
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(total, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in () if module is None else module.parameters():
            parameter[first:total] = parameter[:first].float().mean(dim=0).to(parameter)


def learn_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze parameters whose name no pattern matches from its start; of tied ones any name counts.

    Raises RequestError for a pattern that matches none.
    """
    named = [*model.named_parameters(remove_duplicate=False)]
    found = {pattern: {id(item) for name, item in named if re.match(pattern, name)} for pattern in patterns}
    for index, pattern in enumerate(patterns):
        if not found[pattern]:
            raise RequestError(f"trainable.{index}: no parameter's name matches {pattern!r}")
    learning = set().union(*found.values())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in learning)
