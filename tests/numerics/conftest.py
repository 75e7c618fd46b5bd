"""Cases that a script runs on some ranks, and what rank 0 reports of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunCases = Callable[[Path, int, list[dict[str, Any]], Path], dict[str, Any]]
"""(script, workers, cases, folder) -> outcome by the case's name."""


@pytest.fixture(scope="session")
def run_cases(run_ranks: Any) -> RunCases:
    """Run a script of this folder."""

    def run(script: Path, workers: int, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        job, result = folder / "job.json", folder / "result.json"
        job.write_text(json.dumps({"cases": cases}))
        run_ranks(script, [job, result], folder, workers)
        outcomes: dict[str, Any] = json.loads(result.read_text())
        return outcomes

    return run
