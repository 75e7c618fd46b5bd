"""What several tiers of tests share."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

# A shell lets a job in the background ignore SIGINT, and all that it starts; the tests of Ctrl-C need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RANKS_TIMEOUT_S = 300

# How fast a machine is decides no property. The same examples every time: what fails here fails everywhere. To look for
# new ones: pytest --hypothesis-profile=search.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile("same")


class RunRanks(Protocol):
    """Runs a script once a rank; a rank that ends with anything but 0 fails the test with every rank's log."""

    def __call__(
        self, script: Path, arguments: Sequence[object], folder: Path, workers: int, **environment: str
    ) -> None: ...


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Processes with torchrun's environment on the CPU, which leave their logs in a folder."""
    return _run_ranks


def _run_ranks(script: Path, arguments: Sequence[object], folder: Path, workers: int, **environment: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    logs = [folder / f"rank{rank}.log" for rank in range(workers)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), *map(str, arguments)],
                        env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [process.wait(timeout=RANKS_TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * workers, "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture, so that every run of the tests shows it."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return print_it
