"""The small stages of every family, run once for all files of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import run_every_stage, run_families

sys.path.pop(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every family ran on two workers, some with a stop, and with the plain engine on one."""
    return run_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def every_stage(finished: Path) -> Path:
    """The same, in which every family ran under every ZeRO stage, and was stopped and resumed."""
    return run_every_stage(finished)
