"""PPO's critic as an artifact: a token classification model with one label, its adapters merged."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.text.build_policy import network_tensors
from rlhf.text.policy import PolicyModels
from trainers.data.tokenizer import Tokenization
from trainers.models.folders import probe, saved_buffers, write_model
from trainers.models.load import head_name, stock_class
from trainers.models.lora import adapter_layers
from trainers.models.merged_adapters import base_tensors, folded_adapter, merged_tensors
from trainers.models.verification import Probe

HEAD = "value_head."
"""What the names of the value head's parameters start with."""


class Critic:
    """The critic of a stage; `tensors` are the whole parameters of its models by name."""

    def __init__(self, models: PolicyModels, tensors: Mapping[str, Tensor]) -> None:
        self._models = models
        self._route = models.routes["critic"]
        self._network: Any = models.networks[self._route.network]
        own = network_tensors(tensors, self._route.network)
        adapters = self._route.adapters
        self._whole = merged_tensors(self._network, own, adapters) if adapters else own
        self._head = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
        config: Any = copy.deepcopy(self._network.config)
        config.num_labels = 1
        with torch.device("meta"):
            self._stock: Any = stock_class(config.model_type, "value_model")(config)

    def probe(self) -> Probe:
        """Probe the live critic with its adapters merged, every parameter in place."""
        layers = adapter_layers(self._network)
        playing = folded_adapter(self._network, self._route.adapters, layers, self._whole)
        head = self._models.value_head
        assert head is not None
        with playing:
            live = base_tensors(dict(self._network.named_parameters()))
            weights = self._stock_names(live, {f"{HEAD}{name}": tensor for name, tensor in head.named_parameters()})
            return probe(_ValueModel(self._network, head), "value_model", weights)

    def write(self, folder: Path, tokenization: Tokenization, dtype: torch.dtype) -> None:
        """Write its folder."""
        tensors = self._stock_names({**self._whole, **saved_buffers(self._network)}, self._head)
        write_model(folder, "value_model", self._stock.config, tensors, tokenization.files(), dtype=dtype)

    def _stock_names(self, network: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Give the tensors that the stock class has, by its names."""
        prefix = "" if self._network.base_model is not self._network else f"{self._network.base_model_prefix}."
        wanted = set(self._stock.state_dict())
        named = {f"{prefix}{name}": tensor for name, tensor in network.items() if f"{prefix}{name}" in wanted}
        own = head_name(self._stock)
        return (named | {f"{own}.{name.removeprefix(HEAD)}": tensor for name, tensor in head.items()}).items()


class _ValueModel(nn.Module):
    """A network and the value head in the form of the stock class, to be probed."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.config = network.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        """One value per token."""
        base: Any = self.network.base_model
        states = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.head(states))
