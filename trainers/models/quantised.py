"""Frozen bases in 4 or 8 bits under adapters that learn: QLoRA (Dettmers et al. 2023).

What the adapter learns on is the base as those bits give it back, so that this is the base in everything that follows:
the merged model, verification and later stages add the adapter to the rounded weights, which any process computes from
the files (`round_base`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from trainers.runtime.low_bits import CODECS, Method, backbone_linears, is_transposed, round_linears, rows_first


class Quantised(nn.Module):
    """A linear module whose weight does not learn and is kept in few bits.

    Codes and scales are buffers of bytes that no state holds: no engine rounds, shards or saves them.
    """

    dtype: torch.dtype
    """Precision in which the base takes part."""
    whole: Tensor | None = None
    """What takes the weight's place for a while."""
    codes: Tensor
    scale_bytes: Tensor

    def keep(self, linear: nn.Linear | Conv1D, method: Method, dtype: torch.dtype) -> None:
        """Keep a module's weight in few bits, and its bias as it is."""
        weight_OI = rows_first(linear, linear.weight.detach().to(dtype).float())
        self.codec, self.dtype, self.shape_OI = CODECS[method], dtype, tuple(weight_OI.shape)
        codes, scales = self.codec.encode(weight_OI)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale_bytes", scales.view(torch.uint8), persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight in the module's form, rounded to `dtype`, in fp32."""
        return self.decoded(self.dtype).float()

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in the module's form and in `dtype`, rounded to the base's first."""
        if self.whole is not None:
            return self.whole.to(dtype)
        scales = self.scale_bytes.view(torch.float32)
        return rows_first(self, self.codec.decode(self.codes, scales, self.shape_OI)).to(self.dtype).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the weight is decoded here and in the backward pass, and kept by neither."""
        product: Tensor = _Product.apply(input, self)
        return product if self.bias is None else product + self.bias


class QuantisedLinear(Quantised, nn.Linear):  # type: ignore[override]
    """In the place of a linear module."""

    def __init__(self, linear: nn.Linear, method: Method, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.keep(linear, method, dtype)


class QuantisedConv1D(Quantised, Conv1D):
    """In the place of GPT-2's linear module; peft knows it by its class."""

    def __init__(self, linear: Conv1D, method: Method, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = linear.nx, linear.nf
        self.keep(linear, method, dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return functional.linear(input, rows_first(layer, layer.decoded(input.dtype)))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ rows_first(ctx.layer, ctx.layer.decoded(gradient.dtype)), None


def quantise_base(model: Any, method: Method, dtype: torch.dtype) -> None:
    """Keep the linear modules of a model's backbone in few bits from now on; they give their weights in `dtype`.

    Raises RequestError for a model without any.
    """
    for path, linear in list(backbone_linears(model)):
        parent, _, name = path.rpartition(".")
        kept = QuantisedConv1D if is_transposed(linear) else QuantisedLinear
        setattr(model.get_submodule(parent), name, kept(linear, method, dtype))
    model.base_rounding = method


def round_base(model: Any, method: Method, dtype: torch.dtype) -> None:
    """Set the same weights to what few bits give back of them, and keep them as they are kept."""
    round_linears(model, method, dtype)
    model.base_rounding = method


@contextmanager
def decoded_once(model: nn.Module) -> Iterator[None]:
    """Keep the decoded weights meanwhile, for many short forwards: on CPUs, where decoding takes longer than these."""
    layers = [module for module in model.modules() if isinstance(module, Quantised)]
    layers = [layer for layer in layers if layer.codes.device.type == "cpu"]
    for layer in layers:
        layer.whole = layer.decoded(layer.dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.whole = None


def base_rounding(model: Any) -> Method | None:
    """Return how the weights under a model's adapters are rounded; None: not."""
    found: Method | None = getattr(model, "base_rounding", None)
    return found


def quantised_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are kept in few bits, whole on the CPU, by the names of parameters."""
    return {
        f"{path}.weight": module.decoded(module.dtype).cpu()
        for path, module in model.named_modules()
        if isinstance(module, Quantised)
    }


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model by name, with the weights that are kept in few bits."""
    return dict(model.named_parameters()) | quantised_weights(model)
