"""Scalar heads: where the stock classes keep them, and how they travel in an adapter's files."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainers.architectures.load import ModelKind, head_name
from trainers.architectures.lora import DEFAULT, adapter_tensors

TASKS: dict[ModelKind, str] = {"language_model": "CAUSAL_LM", "score_model": "SEQ_CLS", "value_model": "TOKEN_CLS"}


def learn_head(network: nn.Module) -> None:
    """Let the head learn beside the adapters of a frozen network."""
    network.get_submodule(head_name(network)).requires_grad_(True)


def peft_task(peft_config: Any, kind: ModelKind, head: str) -> Any:
    """The adapter's configuration for a network with a scalar head, which is saved whole beside the adapter."""
    config = copy.copy(peft_config)
    config.task_type = TASKS[kind]
    config.modules_to_save = [head]
    return config


def adapter_with_head(tensors: Mapping[str, Tensor], head: str, name: str = DEFAULT) -> dict[str, Tensor]:
    """An adapter's and the head's tensors under the names of peft's files."""
    heads = {f"base_model.model.{key}": value for key, value in tensors.items() if key.split(".")[0] == head}
    return {**adapter_tensors(tensors, name), **heads}
