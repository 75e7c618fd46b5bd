"""The actor as files that an engine outside of the learner opens: whole, or its adapter by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.text.build_policy import ACTOR, POLICY
from trainers.engine.protocol import Engine
from trainers.models.folders import file_tensors, write_adapter, write_model
from trainers.models.lora import adapter_tensors, is_adapter_key
from trainers.models.merged_adapters import base_tensors, merged_tensors

_PREFIX = f"networks.{POLICY}."


@dataclass(frozen=True)
class ServedActor:
    """The actor under its engine. Tensors are in the precision that it is sampled in."""

    engine: Engine
    network: Any
    dtype: torch.dtype
    adapters: tuple[str, ...]
    """Names of its adapters, the lowest first; the last one learns."""
    peft_config: Any
    """Of the adapter that learns; None: whole weights do."""
    sends_adapter: bool

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the adapter that is sent by itself; None: whole models are sent."""
        return int(self.peft_config.r) if self.sends_adapter else None

    def whole(self) -> Mapping[str, Tensor]:
        """The model by its names in files, without the adapter where that is sent by itself; collective."""
        tensors = self._tensors([name for name, _ in self.network.named_parameters()])
        if self.sends_adapter:
            tensors = base_tensors(tensors)
        elif self.adapters:
            tensors = merged_tensors(self.network, tensors, self.adapters)
        return self._cast(file_tensors(self.network, tensors))

    def write_whole(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write these with the configuration."""
        write_model(folder, "language_model", self.network.config, tensors.items(), {}, dtype=self.dtype)

    def adapter(self) -> Mapping[str, Tensor]:
        """The adapter by its names in files; collective."""
        names = [name for name, _ in self.network.named_parameters() if is_adapter_key(name, ACTOR)]
        return self._cast(adapter_tensors(self._tensors(names), ACTOR))

    def write_adapter(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write these with the configuration."""
        write_adapter(folder, self.peft_config, tensors.items(), base_digest="", dtype=self.dtype)

    def multiplied(self, adapter: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The adapter with its scale in the second factor, as it is multiplied by."""
        config = self.peft_config
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in adapter.items()}

    def _tensors(self, names: list[str]) -> dict[str, Tensor]:
        found = self.engine.full_parameters([f"{_PREFIX}{name}" for name in names])
        return {name.removeprefix(_PREFIX): tensor for name, tensor in found}

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", self.dtype).contiguous() for name, tensor in tensors.items()}
