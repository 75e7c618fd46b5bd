"""Equal numbers: plain engine and ZeRO 0-3, one worker and two, straight and resumed, with and without LoRA."""

import math
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("training_worker.py")
ZERO = (0, 1, 2, 3)
FP32_LIMIT = 1e-5
BF16_LIMIT = 5e-3


def deepspeed(zero: int, **more: Any) -> dict[str, Any]:
    """Name a case of the sharded engine."""
    return {"engine": "deepspeed", "zero": zero, **more}


def engines(workers: int) -> list[dict[str, Any]]:
    """List the cases that every number of workers runs."""
    variants = {"plain": {"engine": "plain"}} | {f"zero{zero}": deepspeed(zero) for zero in ZERO}
    cases: list[dict[str, Any]] = [{"name": name, "do": "curve", **variant} for name, variant in variants.items()]
    bf16 = {f"{name}-bf16": {**variant, "precision": "bf16"} for name, variant in variants.items()}
    cases += [{"name": name, "do": "curve", **variant} for name, variant in bf16.items()]
    lora = {"plain-lora": {"engine": "plain", "lora": True}} | {
        f"zero{zero}-lora": deepspeed(zero, lora=True) for zero in (2, 3)
    }
    cases += [{"name": name, "do": "curve", **variant} for name, variant in lora.items()]
    gpt2 = {"plain-gpt2": {"engine": "plain"}, "zero3-gpt2": deepspeed(3)}
    cases += [{"name": name, "do": "curve", "architecture": "gpt2", **variant} for name, variant in gpt2.items()]
    cases.append({"name": "zero2-recompute", "do": "curve", "recompute": True, **deepspeed(2)})
    cases += [{**variant, "name": f"start-{name}", "do": "start"} for name, variant in bf16.items()]
    if workers == 2:
        cases.append({"name": "rank-means", "do": "curve", "objective": "rank-means", **deepspeed(2)})
    return cases


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the two-worker processes write and the one-worker processes read."""
    return str(tmp_path_factory.mktemp("numerics") / "store")


@pytest.fixture(scope="module")
def two(run_cases: Any, store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two workers found."""
    cases = engines(2)
    for zero in ZERO:
        cases.append({"name": f"resume-zero{zero}", "do": "resume", "store": store, **deepspeed(zero)})
        bf16 = deepspeed(zero, precision="bf16")
        cases.append({"name": f"resume-zero{zero}-bf16", "do": "resume", "store": store, **bf16})
    for zero in (2, 3):
        lora = deepspeed(zero, lora=True, dropout=0.1)
        cases.append({"name": f"resume-zero{zero}-lora", "do": "resume", "store": store, **lora})
    cases += [{"name": f"skip-zero{zero}", "do": "skip", **deepspeed(zero)} for zero in ZERO]
    cases += [{"name": f"skip-zero{zero}-bf16", "do": "skip", **deepspeed(zero, precision="bf16")} for zero in ZERO]
    cases += [{"name": f"gathered-zero{zero}", "do": "gathered", **deepspeed(zero)} for zero in (2, 3)]
    cases.append({"name": "saved", "do": "save", "store": store, **deepspeed(3)})
    cases.append({"name": "moved-two", "do": "continue", "stage": "saved", "store": store, **deepspeed(1)})
    return run_cases(WORKER, 2, cases, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(run_cases: Any, store: str, two: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker found, in the store where two had been."""
    cases = engines(1)
    cases.append({"name": "resume-plain", "do": "resume", "store": store, "engine": "plain"})
    cases.append({"name": "moved-plain", "do": "continue", "stage": "saved", "store": store, "engine": "plain"})
    cases += [
        {"name": f"moved-zero{zero}", "do": "continue", "stage": "saved", "store": store, **deepspeed(zero)}
        for zero in ZERO
    ]
    return run_cases(WORKER, 1, cases, tmp_path_factory.mktemp("one"))


def checked(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Return one case's outcome; its traceback is the failure."""
    assert name in results, f"{name} did not run; {[r['error'] for r in results.values() if 'error' in r]}"
    assert "error" not in results[name], results[name]["error"]
    found: dict[str, Any] = results[name]
    return found


def difference(found: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    assert len(found) == len(wanted) > 0
    differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    assert all(map(math.isfinite, differences)), differences  # max() passes over a nan
    return max(differences)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["plain", "zero0", "zero1", "zero2", "zero3", "zero2-recompute"])
def test_every_engine_gives_the_plain_curve(one: dict[str, Any], two: dict[str, Any], name: str, workers: int) -> None:
    wanted = checked(one, "plain")["losses"]
    assert wanted[0] - wanted[-1] >= 0.5
    found = checked({1: one, 2: two}[workers], name)
    assert difference(found["losses"], wanted) < FP32_LIMIT
    assert difference(found["norms"], checked(one, "plain")["norms"]) < 1e-3


def test_means_per_rank_give_another_curve(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert difference(checked(two, "rank-means")["losses"], checked(one, "plain")["losses"]) > 10 * FP32_LIMIT


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["plain-bf16", "zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"])
def test_bf16_follows_the_fp32_curve(one: dict[str, Any], two: dict[str, Any], name: str, workers: int) -> None:
    wanted = checked(one, "plain-bf16")["losses"]
    found = checked({1: one, 2: two}[workers], name)["losses"]
    assert difference(found, wanted) < BF16_LIMIT
    assert difference(found, checked(one, "plain")["losses"]) < 2e-2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["plain-bf16", "zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"])
def test_masters_start_from_the_weights_before_rounding(
    one: dict[str, Any], two: dict[str, Any], name: str, workers: int
) -> None:
    found = checked({1: one, 2: two}[workers], f"start-{name}")
    assert sum(rank["elements"] for rank in found["ranks"]) == found["elements"]
    assert all(rank["off"] == 0.0 and rank["rounded"] for rank in found["ranks"])


@pytest.mark.parametrize("name", ["plain-lora", "zero2-lora", "zero3-lora"])
def test_lora_trains_alike_and_freezes_the_base(one: dict[str, Any], two: dict[str, Any], name: str) -> None:
    wanted = checked(one, "plain-lora")
    assert wanted["frozen"] == 2 * 9 + 3
    for results in (one, two):
        found = checked(results, name)
        assert difference(found["losses"], wanted["losses"]) < FP32_LIMIT
        assert found["frozen"] == wanted["frozen"]


def test_tied_weights_train_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    wanted = checked(one, "plain-gpt2")["losses"]
    for results in (one, two):
        assert difference(checked(results, "zero3-gpt2")["losses"], wanted) < FP32_LIMIT


RESUMED = [f"resume-zero{zero}{end}" for zero in ZERO for end in ("", "-bf16")]


@pytest.mark.parametrize("name", [*RESUMED, "resume-zero2-lora", "resume-zero3-lora"])
def test_resumed_equals_straight_to_the_bit(two: dict[str, Any], name: str) -> None:
    found = checked(two, name)
    assert found["steps"] == [4, 5, 6]
    assert found["first_rows"] == list(range(24, 32))
    assert found["resumed"] == found["straight"][3:]
    assert found["found"] == found["wanted"]
    assert found["memory"] == sum(range(1, 7))
    assert found["state"] == "completed"


def test_resumed_plain_equals_straight_to_the_bit(one: dict[str, Any]) -> None:
    found = checked(one, "resume-plain")
    assert found["resumed"] == found["straight"][3:]
    assert found["found"] == found["wanted"]


@pytest.mark.parametrize("name", ["plain", "zero0", "zero1", "zero2", "zero3"])
def test_one_worker_goes_on_from_the_state_of_two(one: dict[str, Any], two: dict[str, Any], name: str) -> None:
    straight = checked(two, "saved")["losses"]
    found = checked(one, f"moved-{name}")
    assert found["steps"][0] == 6
    assert difference(found["losses"], straight[5:]) < FP32_LIMIT


def test_another_zero_stage_goes_on_from_a_state(two: dict[str, Any]) -> None:
    assert difference(checked(two, "moved-two")["losses"], checked(two, "saved")["losses"][5:]) < FP32_LIMIT


@pytest.mark.parametrize("name", [f"skip-zero{zero}{end}" for zero in ZERO for end in ("", "-bf16")])
def test_a_non_finite_loss_on_one_rank_changes_nothing_anywhere(two: dict[str, Any], name: str) -> None:
    found = checked(two, name)
    assert not found["applied"]
    assert found["unchanged"]
    assert found["skipped"] == 1
    assert found["applied_steps"] == 5
    assert found["equal_on_ranks"]
    assert all(loss < 10 for step, loss in enumerate(found["losses"]) if step != 2)
    assert found["message"].endswith("rows of the last one: 30, 31")


@pytest.mark.parametrize("zero", [2, 3])
def test_generation_between_steps_leaves_training_alone(two: dict[str, Any], zero: int) -> None:
    found = checked(two, f"gathered-zero{zero}")
    assert found["disturbed"] == found["quiet"]
