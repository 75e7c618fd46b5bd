"""What is read of a node's processors."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.hardware import bf16_flag, find_processors
from cluster.session import local_nodes

INTEL = "processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile amx_bf16\nbugs : x\n"
AMD = "processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n"
OLD = "processor : 0\nflags\t\t: fpu avx2\n"
ARM = "processor : 0\nFeatures\t: fp asimd bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "flag"),
    [(INTEL, "amx_bf16"), (AMD, "avx512_bf16"), (OLD, ""), (ARM, ""), ("", ""), (INTEL + AMD, "avx512_bf16")],
)
def test_the_flag_is_one_that_every_processor_has(cpuinfo: str, flag: str) -> None:
    assert bf16_flag(cpuinfo) == flag


def test_this_machine_says_what_the_kernel_says() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text().split()
    (node,) = local_nodes()
    assert (node.cpu_bf16 == "amx_bf16") == ("amx_bf16" in cpuinfo)
    if not node.gpus:
        assert (node.gpu_capability, node.gpu_memory_bytes) == (None, 0)


def test_the_driver_hears_which_gpus_are_visible() -> None:
    hidden = find_processors({"CUDA_VISIBLE_DEVICES": ""})
    assert (hidden.gpu_capability, hidden.gpu_memory_bytes) == (None, 0)


def test_asking_for_the_processors_imports_no_library_of_the_trainer() -> None:
    code = (
        "import sys; from cluster.hardware import find_processors; find_processors(); "
        "print({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
