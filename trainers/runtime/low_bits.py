"""Weights in 4 or 8 bits, and what is left of them.

In torch alone: the same bits on every machine, those of bitsandbytes' NF4, and no need for the package. A kernel that
decodes while it multiplies would save a pass over the memory of each matrix.

Shapes: O outputs, I inputs, V = O I values.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from recipes.errors import RequestError
from recipes.stages.lora import NF4_BLOCK

Method = Literal["nf4", "int8"]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, with 0 among them (Dettmers et al. 2023, appendix E)."""
_INT8_LIMIT = 127


class Codec(Protocol):
    """How weights become bytes."""

    @staticmethod
    def encode(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes (uint8 or int8) and scales (fp32) of fp32 weights."""

    @staticmethod
    def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the weights [O, I] in fp32."""


class Nf4:
    """Two values in a byte, the first in its high half, scaled by the largest of each 64."""

    @staticmethod
    def encode(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [ceil(V / 64) 32] and scales [ceil(V / 64)]."""
        values = functional.pad(weight_OI.flatten(), (0, -weight_OI.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        scales = values.abs().amax(dim=1)
        levels = torch.tensor(NF4)
        places = torch.bucketize(values / scales.clamp(min=1e-38)[:, None], (levels[1:] + levels[:-1]) / 2)
        pairs = places.to(torch.uint8).view(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1], scales

    @staticmethod
    def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Look both values of a byte up at once."""
        levels = torch.tensor(NF4, device=codes.device)
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
        values = pairs.index_select(0, codes.int()).view(-1, NF4_BLOCK) * scales[:, None]
        return values.view(-1)[: math.prod(shape)].view(shape)


class Int8:
    """A byte for each value, scaled by the largest of each row (the weights of LLM.int8(), Dettmers et al. 2022)."""

    @staticmethod
    def encode(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [O, I] and scales [O]."""
        scales = weight_OI.abs().amax(dim=1) / _INT8_LIMIT
        return (weight_OI / scales.clamp(min=1e-38)[:, None]).round().to(torch.int8), scales

    @staticmethod
    def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Multiply."""
        return codes.view(shape).float() * scales[:, None]


CODECS: dict[Method, Codec] = {"nf4": Nf4, "int8": Int8}


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a module is the linear module of GPT-2, whose weight is [I, O]."""
    return isinstance(module, Conv1D)


def rows_first(module: nn.Module, weight: Tensor) -> Tensor:
    """Turn the weight of a linear module from the module's form into [O, I], or from this into the module's."""
    return weight.T.contiguous() if is_transposed(module) else weight


def backbone_linears(model: Any) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Yield the linear modules of a model but its head; raises RequestError where it has none."""
    inner, head = {id(module) for module in model.base_model.modules()}, model.get_output_embeddings()
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inner and module is not head
    ]
    if not found:
        raise RequestError(f"lora.quantize: {type(model).__name__} has no linear modules to quantise")
    yield from found


@torch.no_grad()
def round_linears(model: Any, method: Method, dtype: torch.dtype) -> None:
    """Set the weights of a model's linear modules, its head's left out, to what few bits give back in `dtype`."""
    codec = CODECS[method]
    for _, linear in backbone_linears(model):
        weight_OI = rows_first(linear, linear.weight)
        decoded_OI = codec.decode(*codec.encode(weight_OI.to(dtype).float()), tuple(weight_OI.shape))
        linear.weight.copy_(rows_first(linear, decoded_OI).to(dtype))
