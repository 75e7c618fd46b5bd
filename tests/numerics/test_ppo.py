"""PPO gives equal numbers: plain engine and ZeRO 0-3, one worker and two, straight and resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORKER = Path(__file__).with_name("ppo_worker.py")
STEPS_PER_ITERATION = 4
TEXT_COEF = 3.0
TEXT = {"text_coef": TEXT_COEF, "text_batch": 4, "text_length": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    **{f"zero{zero}": {"engine": "deepspeed", "zero": zero} for zero in (0, 1, 2, 3)},
    "full-plain": {"engine": "plain", "lora": False},
    "full-zero3": {"engine": "deepspeed", "zero": 3, "lora": False},
    "text-plain": {"engine": "plain", "settings": TEXT},
    "text-zero2": {"engine": "deepspeed", "zero": 2, "settings": TEXT},
    "text-zero3": {"engine": "deepspeed", "zero": 3, "settings": TEXT},
}
BF16: dict[str, dict[str, Any]] = {
    "bf16-plain": {"engine": "plain", "precision": "bf16"},
    "bf16-zero3": {"engine": "deepspeed", "zero": 3, "precision": "bf16"},
}
RESUMED = ("plain", "zero2", "zero3", "bf16-zero3")


def cases(store: str, workers: int) -> list[dict[str, Any]]:
    """Every engine straight on, some of them stopped within an iteration and resumed."""
    straight = [
        {"name": name, "do": "straight", "stage": f"straight-{name}-{workers}", "store": store, **variant}
        for name, variant in (VARIANTS | BF16).items()
    ]
    resumed = [
        {
            "name": f"resume-{name}",
            "do": "resume",
            "stop_at": STEPS_PER_ITERATION + 1,
            "stage": f"resume-{name}-{workers}",
            "store": store,
            **(VARIANTS | BF16)[name],
        }
        for name in RESUMED
    ]
    gradients = [
        {"name": f"gradient-{name}-{micro_batch}", "do": "gradient", "engine": "plain", "micro_batch": micro_batch}
        | {"settings": settings, "stage": f"gradient-{name}-{micro_batch}-{workers}", "store": store}
        for name, settings in (("mixed", TEXT), ("alone", {"text_coef": 0.0}))
        for micro_batch in (1, 2)
    ]
    return straight + resumed + gradients


@pytest.fixture(scope="module")
def results(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one worker and two workers found."""
    store = str(tmp_path_factory.mktemp("ppo") / "store")
    return {
        workers: run_cases(WORKER, workers, cases(store, workers), tmp_path_factory.mktemp(f"ppo{workers}"))
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
    kind = name.rpartition("-")[0]
    wanted = first_iteration(checked(results, 1, f"{kind}-plain" if kind else "plain"))
    found = first_iteration(checked(results, workers, name))
    assert len(found) == len(wanted) == 1 + STEPS_PER_ITERATION
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", VARIANTS | BF16)
def test_every_iteration_begins_with_ratios_of_exactly_one(
    results: dict[int, dict[str, Any]], name: str, workers: int
) -> None:
    heard = checked(results, workers, name)["heard"]
    largest = {step: values["log_ratio_max"] for step, values in heard if "log_ratio_max" in values}
    assert [step for step, value in largest.items() if value == 0] == [1, 5, 9]
    assert len(largest) == 3 * STEPS_PER_ITERATION


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_straight_to_the_bit(results: dict[int, dict[str, Any]], name: str, workers: int) -> None:
    straight = checked(results, workers, name)
    resumed = checked(results, workers, f"resume-{name}")
    assert resumed["preempted"]
    assert resumed["digest"] == straight["digest"]
    assert all(line in straight["heard"] for line in resumed["heard"])
    assert resumed["heard"][0][1]["iteration"] == 2.0


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_text_in_the_loss_adds_its_gradient(results: dict[int, dict[str, Any]], workers: int, micro_batch: int) -> None:
    mixed = np.array(checked(results, workers, f"gradient-mixed-{micro_batch}")["gradient"])
    alone = np.array(checked(results, 1, "gradient-alone-2")["gradient"])
    text = np.array(checked(results, 1, "gradient-mixed-2")["text"])
    assert np.abs(TEXT_COEF * text).max() > 0.1 * np.abs(alone).max() > 0
    np.testing.assert_allclose(mixed, alone + TEXT_COEF * text, atol=1e-5 * np.abs(mixed).max())
