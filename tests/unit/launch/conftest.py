"""A run without training: stages that only write a file, in this process."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch.bench import RECIPE, Bench, Stages, trainwright
from trainers.store.store import Store


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words to read\n" * 20)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def bench(store: Store, recipe: Path, stages: Stages) -> Bench:
    return Bench(store, recipe, stages)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("TRAINWRIGHT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: trainwright(*arguments, capsys=capsys, monkeypatch=monkeypatch)
