"""Numeric set-up of a worker: the dtype of a precision, and the fast fp32 product where it is exact enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_RELATIVE_ERROR = 2e-6
PROBE_WIDTH = 2048


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of parameters and activations."""
    match precision:
        case "fp32":
            return torch.float32
        case "bf16":
            return torch.bfloat16
    raise ValueError(f"unknown precision {precision!r}")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor has neither NaN nor infinity: its extremes show both, which take one fast pass."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def use_fast_matmul(device: torch.device) -> bool:
    """Let fp32 products of training go the fast way: TF32 on GPUs, on CPUs oneDNN; tell whether they do.

    On GPUs the tensor cores round the factors to 10 bits of mantissa and add up in fp32 (GPUs without them ignore it).
    On CPUs oneDNN (AVX-512) serves if a probe shows fp32 accuracy: the setting permits bf16 inside, and chips on which
    oneDNN takes that up (AMX) fail the probe and keep the default.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        return True
    torch.set_float32_matmul_precision("medium")
    if _probe_error() < MAX_RELATIVE_ERROR:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def unit_roundoff(precision: str, device: torch.device) -> float:
    """Return the relative error of products in a precision: the format's, or that of the fast kernels let in."""
    if precision == "bf16":
        return 2.0**-8
    if device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        return 2.0**-11
    return MAX_RELATIVE_ERROR


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Run fp32 products and convolutions in fp32."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def _probe_error() -> float:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(64, PROBE_WIDTH, generator=generator)
    right = torch.randn(64, PROBE_WIDTH, generator=generator)
    exact = left.double() @ right.double().T
    found = torch.nn.functional.linear(left, right).double()
    return float((found - exact).norm() / exact.norm())
