"""A tiny training with everything that a resume can miss: dropout, accumulation, a source with a memory."""

from pathlib import Path

import pytest

from tests.unit.trainers.tiny_training import open_checkpoint, run


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(open_checkpoint(str(tmp_path_factory.mktemp("straight"))), save_every=10**6).digest
