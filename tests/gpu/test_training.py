"""One GPU: every engine gives the plain curve, bf16 follows it, states resume to the bit, memory is what is predicted.

Runs the cases of tests/numerics on CUDA with NCCL; skipped where there is no GPU.
"""

import functools
import math
from typing import Any

import pytest
import torch

from tests.numerics.outcomes import Outcomes, all_cases
from tests.numerics.training_cases import run
from tests.ranks import start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ZERO = (0, 1, 2, 3)
OFFLOADED = (1, 2, 3)


def deepspeed(zero: int, **more: Any) -> dict[str, Any]:
    """Name a case of the sharded engine."""
    return {"engine": "deepspeed", "zero": zero, **more}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
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
    ended = start_ranks(folder, 1, functools.partial(all_cases, run, cases), device="cuda")
    assert ended.codes == [0], ended.logs
    return Outcomes(ended.results[0])


def difference(found: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    assert all(map(math.isfinite, differences)), differences  # max() passes over a nan
    return max(differences)


@pytest.mark.parametrize("name", [*(f"zero{zero}" for zero in ZERO), "offload"])
def test_every_engine_gives_the_plain_curve(found: Outcomes, name: str) -> None:
    wanted = found["plain"]["losses"]
    assert wanted[0] - wanted[-1] >= 0.5
    assert difference(found[name]["losses"], wanted) < 1e-5


@pytest.mark.parametrize("zero", ZERO)
def test_bf16_follows_the_fp32_curve(found: Outcomes, zero: int) -> None:
    assert difference(found[f"zero{zero}-bf16"]["losses"], found["plain"]["losses"]) < 3e-2


@pytest.mark.parametrize("zero", ZERO)
def test_resumed_equals_straight_to_the_bit(found: Outcomes, zero: int) -> None:
    outcome = found[f"resume-zero{zero}"]
    assert outcome["found"] == outcome["wanted"]
    assert outcome["resumed"] == outcome["straight"][3:]


@pytest.mark.parametrize("zero", OFFLOADED)
def test_an_offloaded_optimiser_is_resumed_to_the_bit(found: Outcomes, zero: int) -> None:
    outcome = found[f"resume-offload{zero}"]
    assert outcome["found"] == outcome["wanted"]
    assert outcome["resumed"] == outcome["straight"][3:]


@pytest.mark.parametrize("zero", OFFLOADED)
@pytest.mark.parametrize(("moved", "saved"), [("to-device", "saved-offload"), ("to-offload", "saved-device")])
def test_a_state_moves_between_host_and_device(found: Outcomes, moved: str, saved: str, zero: int) -> None:
    straight = found[f"{saved}{zero}"]["losses"]
    outcome = found[f"{moved}{zero}"]
    assert outcome["steps"][0] == 6
    assert difference(outcome["losses"], straight[5:]) < 1e-5


@pytest.mark.parametrize("zero", ZERO)
def test_a_non_finite_loss_changes_nothing(found: Outcomes, zero: int) -> None:
    outcome = found[f"skip-zero{zero}"]
    assert outcome["unchanged"]
    assert outcome["skipped"] == 1


def test_lora_trains_under_zero_3(found: Outcomes) -> None:
    losses = found["lora"]["losses"]
    assert losses[-1] < losses[0]
