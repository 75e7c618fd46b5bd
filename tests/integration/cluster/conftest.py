"""An embedded Ray for a module of tests; never two at a time in one process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.protocol import WorkerSpec
from cluster.session import Session, start

HERE = str(Path(__file__).resolve().parent)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """An embedded Ray that offers four CPUs and three GPUs, whatever the machine has."""
    with start(log_folder=tmp_path_factory.mktemp("ray-logs"), num_cpus=4, num_gpus=3) as session:
        yield session


@pytest.fixture(scope="session")
def make_spec(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WorkerSpec]:
    """Specs whose ranks find the targets of this folder; `preloaded` says when it was imported."""

    def make(**fields: Any) -> WorkerSpec:
        defaults: dict[str, Any] = {
            "name": "learners",
            "num_workers": 2,
            "log_folder": tmp_path_factory.mktemp("logs"),
            "preload": "preloaded",
            "placement_timeout_s": 30.0,
            "environment": {"PYTHONPATH": HERE},
        }
        return WorkerSpec(**{**defaults, **fields})

    return make
