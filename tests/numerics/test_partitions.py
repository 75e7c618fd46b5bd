"""No rank holds or reads more of a sharded state than its part: counted on two ranks and on three."""

from pathlib import Path

import pytest

from tests.numerics.outcomes import run_cases
from tests.numerics.training_cases import run

ALIGNMENT = 64
"""Of every piece in the buffer of a save."""
CASES = {
    "zero3": {},
    "zero3-bf16": {"precision": "bf16"},
    "zero3-persistent": {"persistence_threshold": 100},
    "zero3-persistent-bf16": {"persistence_threshold": 100, "precision": "bf16"},
}
"""With a threshold the norms' weights stay whole on every rank."""


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_rank_reads_and_saves_its_part_alone(tmp_path: Path, workers: int) -> None:
    cases = [{"name": name, "do": "partition", "engine": "deepspeed", "zero": 3, **CASES[name]} for name in CASES]
    results = run_cases(run, workers, cases, tmp_path)
    for name in CASES:
        found = results[name]
        assert found["wanted"] == found["found"] != found["emptied"], name
        part = found["elements"] / workers + found["tensors"]
        assert sum(found["read"]) == sum(found["held"]) == found["elements"], name
        assert max(found["read"]) <= part, name
        assert max(found["buffer"]) <= 4 * part + ALIGNMENT * found["tensors"], name
        assert found["unused"] == [], "they cost every stage's start a second of CPU and more"
