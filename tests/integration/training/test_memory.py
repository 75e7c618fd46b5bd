"""What the plan predicts of a worker's memory is what a process takes, within a quarter."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "memory.py"


def load_benchmark() -> Any:
    """The script that measures."""
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


memory = load_benchmark()


@pytest.mark.long
@pytest.mark.serial
@pytest.mark.parametrize("shape", memory.SHAPES)
def test_predicted_memory_is_what_a_process_takes(shape: str) -> None:
    predicted, measured = memory.predicted_bytes(memory.SHAPES[shape]), memory.measured_bytes(shape)
    assert 0.75 * measured <= predicted <= 1.25 * measured, f"{predicted / 2**20:.0f} and {measured / 2**20:.0f} MiB"
