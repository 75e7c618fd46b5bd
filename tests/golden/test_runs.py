"""Smoke forms of shipped recipes train as they did, bit for bit: `python -m tests.golden.runs`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden.fingerprints import ROOT, shipped_recipes
from tests.golden.runs import FAST, NOT_RECORDED, RUNS, differences, environment, load, missing_model

CHANGED = "\nwhere that is meant: python -m tests.golden.runs {}\n"
TIMEOUT_S = 550

Found = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """What recipes came to in this environment."""
    record = load()
    if record is None:
        pytest.skip(f"nothing is recorded for {json.dumps(environment())}; to record it: python -m tests.golden.runs")
    return dict(record["recipes"])


def _run(folder: Path, *recipes: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.golden.runs", *recipes, "--to", str(folder / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / "found.json").read_text(encoding="utf-8")))


def _compare(name: str, recorded: dict[str, Any], found: dict[str, Any]) -> None:
    if name not in recorded:
        pytest.skip(f"{name} is not recorded in this environment; to record it: python -m tests.golden.runs {name}")
    changed = list(differences({name: recorded[name]}, {name: found[name]}))
    assert not changed, CHANGED.format(name) + "\n".join(changed)


def test_every_shipped_recipe_is_recorded_or_has_a_reason() -> None:
    for path in sorted(RUNS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))["recipes"]
        assert found.keys() | NOT_RECORDED.keys() == set(shipped_recipes()), f"python -m tests.golden.runs: {path.name}"
        assert not found.keys() & NOT_RECORDED.keys()


@pytest.fixture(scope="module")
def fast_runs(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipes that have every kind of stage and every family between them, run once."""
    return _run(tmp_path_factory.mktemp("golden"), *FAST)


@pytest.mark.parametrize("name", FAST)
def test_it_trains_as_it_did(name: str, recorded: dict[str, Any], fast_runs: dict[str, Any]) -> None:
    _compare(name, recorded, fast_runs)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name not in FAST])
def test_the_others_train_as_they_did(name: str, recorded: dict[str, Any], tmp_path: Path) -> None:
    if missing_model(name):
        pytest.skip(missing_model(name))
    _compare(name, recorded, _run(tmp_path, name))
