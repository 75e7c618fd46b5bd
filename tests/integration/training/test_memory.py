"""What the plan predicts of a worker's memory is what a process takes: parts to a tenth, the peak to a fifth."""

from pathlib import Path

import pytest

from benchmarks.memory import Line, lines_of, measure, process_bytes, start_fork_server
from benchmarks.memory_grid import RECIPES, write_data

REPRESENTATIVE = ("pretrain-zero2",)
"""In the default tier: two ranks, masters, what ZeRO shards, the copies that DeepSpeed makes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("memory")
    write_data(found)
    start_fork_server()
    return found


def is_near(line: Line) -> bool:
    """Whether a prediction is as good as docs/memory.md says."""
    return abs(line.predicted - line.measured) <= (0.2 if line.part == "peak" else 0.1) * line.measured


@pytest.mark.serial
@pytest.mark.parametrize(
    "name", [name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.long) for name in RECIPES]
)
def test_predicted_memory_is_what_a_process_takes(name: str, folder: Path) -> None:
    lines = [*lines_of(name, *measure(name, folder), process_bytes(folder))]
    assert len(lines) >= 2
    assert [line.text for line in lines if not is_near(line)] == []
