"""One GPU: every engine gives the plain curve, bf16 follows it, states resume to the bit, memory is what is predicted.

Runs the cases of tests/numerics on CUDA with NCCL; skipped where there is no GPU.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WORKER = Path(__file__).parents[1] / "numerics" / "training_worker.py"
ZERO = (0, 1, 2, 3)
OFFLOADED = (1, 2, 3)


def deepspeed(zero: int, **more: Any) -> dict[str, Any]:
    """Name a case of the sharded engine."""
    return {"engine": "deepspeed", "zero": zero, **more}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker on one GPU found."""
    folder = tmp_path_factory.mktemp("gpu")
    store = str(folder / "store")
    cases: list[dict[str, Any]] = [{"name": "plain", "do": "curve", "engine": "plain"}]
    cases += [{"name": f"zero{zero}", "do": "curve", **deepspeed(zero)} for zero in ZERO]
    cases += [{"name": f"zero{zero}-bf16", "do": "curve", **deepspeed(zero, precision="bf16")} for zero in ZERO]
    cases += [{"name": f"resume-zero{zero}", "do": "resume", "store": store, **deepspeed(zero)} for zero in ZERO]
    cases += [{"name": f"skip-zero{zero}", "do": "skip", **deepspeed(zero, precision="bf16")} for zero in ZERO]
    cases.append({"name": "lora", "do": "curve", "lora": True, **deepspeed(3)})
    cases.append({"name": "offload", "do": "curve", **deepspeed(2, offload="cpu")})
    for zero in OFFLOADED:
        offloaded = deepspeed(zero, offload="cpu")
        cases.append({"name": f"resume-offload{zero}", "do": "resume", "store": store, **offloaded})
        cases.append({"name": f"saved-offload{zero}", "do": "save", "store": store, **offloaded})
        cases.append({"name": f"saved-device{zero}", "do": "save", "store": store, **deepspeed(zero)})
        moved = {"do": "continue", "store": store}
        cases.append({"name": f"to-device{zero}", "stage": f"saved-offload{zero}", **moved, **deepspeed(zero)})
        cases.append({"name": f"to-offload{zero}", "stage": f"saved-device{zero}", **moved, **offloaded})
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"cases": cases}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "PYTHONPATH": str(Path.cwd()), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(job), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(result.read_text())
    return results


def checked(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Return one case's outcome; its traceback is the failure."""
    assert "error" not in results[name], results[name]["error"]
    outcome: dict[str, Any] = results[name]
    return outcome


def difference(found: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    assert all(map(math.isfinite, differences)), differences  # max() passes over a nan
    return max(differences)


@pytest.mark.parametrize("name", [*(f"zero{zero}" for zero in ZERO), "offload"])
def test_every_engine_gives_the_plain_curve(found: dict[str, Any], name: str) -> None:
    wanted = checked(found, "plain")["losses"]
    assert wanted[0] - wanted[-1] >= 0.5
    assert difference(checked(found, name)["losses"], wanted) < 1e-5


@pytest.mark.parametrize("zero", ZERO)
def test_bf16_follows_the_fp32_curve(found: dict[str, Any], zero: int) -> None:
    assert difference(checked(found, f"zero{zero}-bf16")["losses"], checked(found, "plain")["losses"]) < 3e-2


@pytest.mark.parametrize("zero", ZERO)
def test_resumed_equals_straight_to_the_bit(found: dict[str, Any], zero: int) -> None:
    outcome = checked(found, f"resume-zero{zero}")
    assert outcome["found"] == outcome["wanted"]
    assert outcome["resumed"] == outcome["straight"][3:]


@pytest.mark.parametrize("zero", OFFLOADED)
def test_an_offloaded_optimiser_is_resumed_to_the_bit(found: dict[str, Any], zero: int) -> None:
    outcome = checked(found, f"resume-offload{zero}")
    assert outcome["found"] == outcome["wanted"]
    assert outcome["resumed"] == outcome["straight"][3:]


@pytest.mark.parametrize("zero", OFFLOADED)
@pytest.mark.parametrize(("moved", "saved"), [("to-device", "saved-offload"), ("to-offload", "saved-device")])
def test_a_state_moves_between_host_and_device(found: dict[str, Any], moved: str, saved: str, zero: int) -> None:
    straight = checked(found, f"{saved}{zero}")["losses"]
    outcome = checked(found, f"{moved}{zero}")
    assert outcome["steps"][0] == 6
    assert difference(outcome["losses"], straight[5:]) < 1e-5


@pytest.mark.parametrize("zero", ZERO)
def test_a_non_finite_loss_changes_nothing(found: dict[str, Any], zero: int) -> None:
    outcome = checked(found, f"skip-zero{zero}")
    assert outcome["unchanged"]
    assert outcome["skipped"] == 1


def test_lora_trains_under_zero_3(found: dict[str, Any]) -> None:
    losses = checked(found, "lora")["losses"]
    assert losses[-1] < losses[0]
