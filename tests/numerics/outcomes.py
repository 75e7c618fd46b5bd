"""Cases that run one after the other on some ranks, and what rank 0 reports of each."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks
from trainers.runtime import distributed

Case = Mapping[str, Any]
"""`name`, `do`, and what differs from the rule."""
Outcome = dict[str, Any]
"""What `do` reports; or `error`, a traceback."""
Run = Callable[[Case], Outcome]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes by their case's name."""

    found: dict[str, Outcome]

    def __getitem__(self, name: str) -> Outcome:
        """One case's outcome; its traceback is the failure."""
        assert name in self.found, f"{name} did not run; {[o['error'] for o in self.found.values() if 'error' in o]}"
        assert "error" not in self.found[name], self.found[name]["error"]
        return self.found[name]


def run_cases(run: Run, workers: int, cases: list[Case], folder: Path) -> Outcomes:
    """Run cases in one group of ranks; one that fails hides those after it on many ranks alone."""
    return Outcomes(run_ranks(folder, workers, all_cases, run, cases)[0])


def all_cases(run: Run, cases: list[Case]) -> dict[str, Outcome]:
    """The work of one rank."""
    ranks = distributed.join()
    found: dict[str, Outcome] = {}
    for case in cases:
        try:
            found[case["name"]] = run(case)
        except Exception:
            found[case["name"]] = {"error": traceback.format_exc()}
            if ranks.world_size > 1:
                break
    distributed.leave()
    return found
