"""The small stages of every family, run once for all files of this folder."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import run_families

sys.path.pop(0)


@pytest.fixture(scope="session")
def finished(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every family ran on two workers, and with the plain engine on one."""
    return run_families(run_ranks, tmp_path_factory.mktemp("families"), (3,))


@pytest.fixture(scope="session")
def every_stage(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every family ran under every ZeRO stage on two workers."""
    return run_families(run_ranks, tmp_path_factory.mktemp("every_stage"), (0, 2, 3))
