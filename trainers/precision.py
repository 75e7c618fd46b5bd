"""Numeric set-up of a worker: the dtype of a precision, and the fast fp32 product where it is exact enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


def use_fast_matmul(device: torch.device) -> bool:
    """Let CPU fp32 products go through oneDNN (AVX-512) if a probe shows fp32 accuracy; tell whether they do.

    The setting permits bf16 inside; chips on which oneDNN takes that up (AMX) fail the probe and keep the default.
    """
    if device.type != "cpu":
        return False
    torch.set_float32_matmul_precision("medium")
    if _probe_error() < MAX_RELATIVE_ERROR:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Run fp32 products at the library's default accuracy."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _probe_error() -> float:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(64, PROBE_WIDTH, generator=generator)
    right = torch.randn(64, PROBE_WIDTH, generator=generator)
    exact = left.double() @ right.double().T
    found = torch.nn.functional.linear(left, right).double()
    return float((found - exact).norm() / exact.norm())
