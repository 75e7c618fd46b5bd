"""TF32 in training and fp32 where outputs are verified; what the driver says of the GPU is what torch says."""

import torch

from cluster.hardware import find_processors
from launch.capacity.nodes import nodes_of
from launch.capacity.workers import Workers, hardware_of
from trainers.runtime.precision import exact_matmul, use_fast_matmul

WIDTH = 1024
TF32_ERROR, FP32_ERROR = 1e-3, 2e-6
"""Largest relative error of a product: 10 bits of mantissa, and fp32's."""


def errors(device: torch.device) -> tuple[float, float]:
    """Relative errors of a product and of a convolution against fp64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(2))
    images, kernel = torch.randn(8, 64, 32, 32, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    wanted = (left.double() @ right.double(), torch.nn.functional.conv2d(images.double(), kernel.double()))
    found = (left.to(device) @ right.to(device), torch.nn.functional.conv2d(images.to(device), kernel.to(device)))
    one, two = (float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    return one, two


def test_training_uses_tf32_and_verification_does_not() -> None:
    device = torch.device("cuda", 0)
    assert use_fast_matmul(device)
    has_tf32 = torch.cuda.get_device_capability(0) >= (8, 0)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    fast = errors(device)
    with exact_matmul():
        exact = errors(device)
    assert max(exact) < FP32_ERROR
    assert max(fast) < TF32_ERROR
    assert not has_tf32 or fast[0] > 10 * exact[0]
    assert torch.backends.cuda.matmul.allow_tf32


def test_the_driver_says_what_torch_says() -> None:
    found = find_processors()
    devices = range(torch.cuda.device_count())
    capabilities = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)]
    assert found.gpu_capability == min(capabilities)
    assert found.gpu_memory_bytes == min(torch.cuda.get_device_properties(device).total_memory for device in devices)


def test_a_gpu_with_tensor_cores_for_bf16_is_fast_at_it() -> None:
    hardware = hardware_of(nodes_of(None), Workers(1, 1))
    is_fast = torch.cuda.get_device_capability(0) >= (8, 0)
    assert hardware.is_gpu
    assert bool(hardware.fast_bf16) == is_fast
    assert hardware.worker_bytes == find_processors().gpu_memory_bytes
