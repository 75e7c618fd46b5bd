"""PPO gives equal numbers: plain engine and ZeRO 0-3, one worker and two, straight and resumed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("ppo_worker.py")
STEPS_PER_ITERATION = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    **{f"zero{zero}": {"engine": "deepspeed", "zero": zero} for zero in (0, 1, 2, 3)},
    "full-plain": {"engine": "plain", "lora": False},
    "full-zero3": {"engine": "deepspeed", "zero": 3, "lora": False},
}
RESUMED = ("plain", "zero2", "zero3")


def run_ranks(workers: int, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run cases on that many processes with torchrun's environment; returns what rank 0 reports."""
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"cases": cases}))
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
    }
    logs = [folder / f"rank{rank}.log" for rank in range(workers)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), str(job), str(result)],
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * workers, "\n".join(log.read_text()[-3000:] for log in logs)
    results: dict[str, Any] = json.loads(result.read_text())
    return results


def cases(store: str, workers: int) -> list[dict[str, Any]]:
    """Every engine straight on, some of them stopped within an iteration and resumed."""
    straight = [
        {"name": name, "do": "straight", "stage": f"straight-{name}-{workers}", "store": store, **variant}
        for name, variant in VARIANTS.items()
    ]
    resumed = [
        {
            "name": f"resume-{name}",
            "do": "resume",
            "stop_at": STEPS_PER_ITERATION + 1,
            "stage": f"resume-{name}-{workers}",
            "store": store,
            **VARIANTS[name],
        }
        for name in RESUMED
    ]
    return straight + resumed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one worker and two workers found."""
    store = str(tmp_path_factory.mktemp("ppo") / "store")
    return {
        workers: run_ranks(workers, cases(store, workers), tmp_path_factory.mktemp(f"ppo{workers}"))
        for workers in (1, 2)
    }


def checked(results: dict[int, dict[str, Any]], workers: int, name: str) -> dict[str, Any]:
    """Return one case's outcome; its traceback is the failure."""
    found = results[workers]
    assert name in found, f"{name} did not run; {[r['error'] for r in found.values() if 'error' in r]}"
    assert "error" not in found[name], found[name]["error"]
    outcome: dict[str, Any] = found[name]
    return outcome


def first_iteration(outcome: dict[str, Any]) -> list[dict[str, float]]:
    """The rollouts before any update, and the metrics of the updates on them."""
    heard = [values for step, values in outcome["heard"] if step <= STEPS_PER_ITERATION]
    return [values for values in heard if values.get("iteration", 0.0) == 0.0]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_iteration_is_the_same_everywhere(
    results: dict[int, dict[str, Any]], name: str, workers: int
) -> None:
    wanted = first_iteration(checked(results, 1, "full-plain" if name.startswith("full") else "plain"))
    found = first_iteration(checked(results, workers, name))
    assert len(found) == len(wanted) == 1 + STEPS_PER_ITERATION
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_straight_to_the_bit(results: dict[int, dict[str, Any]], name: str, workers: int) -> None:
    straight = checked(results, workers, name)
    resumed = checked(results, workers, f"resume-{name}")
    assert resumed["preempted"]
    assert resumed["digest"] == straight["digest"]
    assert all(line in straight["heard"] for line in resumed["heard"])
    assert resumed["heard"][0][1]["iteration"] == 2.0
