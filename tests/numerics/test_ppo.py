"""PPO and GRPO give equal numbers: plain engine and ZeRO 0-3, one worker and two, straight and resumed."""

from typing import Any

import numpy as np
import pytest

from tests.numerics.outcomes import Case, Outcome, Outcomes, run_cases
from tests.numerics.ppo_cases import run
from tests.tiers import tiered, wants_long

STEPS_PER_ITERATION = 4
TEXT_COEF = 3.0
TEXT = {"text_coef": TEXT_COEF, "text_batch": 4, "text_length": 8}
GRPO = {"name": "grpo", "samples": 4, "prompts": 8, "epochs": 2, "drop_equal_groups": True, "drop_overlong": True}
FP32: dict[str, Case] = {
    "plain": {"engine": "plain"},
    **{f"zero{zero}": {"engine": "deepspeed", "zero": zero} for zero in (0, 1, 2, 3)},
    "full-plain": {"engine": "plain", "lora": False},
    "full-zero3": {"engine": "deepspeed", "zero": 3, "lora": False},
    "text-plain": {"engine": "plain", "settings": TEXT},
    "text-zero2": {"engine": "deepspeed", "zero": 2, "settings": TEXT},
    "text-zero3": {"engine": "deepspeed", "zero": 3, "settings": TEXT},
    "grpo-plain": {"engine": "plain", "settings": GRPO},
    "grpo-zero2": {"engine": "deepspeed", "zero": 2, "settings": GRPO},
    "grpo-zero3": {"engine": "deepspeed", "zero": 3, "settings": GRPO},
}
VARIANTS: dict[str, Case] = {
    **FP32,
    "bf16-plain": {"engine": "plain", "precision": "bf16"},
    "bf16-zero3": {"engine": "deepspeed", "zero": 3, "precision": "bf16"},
}
RESUMED = ("plain", "zero2", "zero3", "bf16-zero3", "grpo-zero2")
DEFAULT: dict[int, tuple[str, ...]] = {
    1: ("plain", "full-plain", "text-plain", "bf16-plain", "grpo-plain"),
    2: ("zero0", "zero3", "full-zero3", "text-zero3", "bf16-zero3", "grpo-zero2"),
}
RESUMED_BY_DEFAULT: dict[int, tuple[str, ...]] = {1: (), 2: ("bf16-zero3", "grpo-zero2")}
"""What each number of workers runs in the default tier; every precision and kind of PPO is there, plain and sharded."""
GRADIENTS: dict[int, list[tuple[str, int]]] = {
    1: [("mixed", 1), ("mixed", 2), ("alone", 2)],
    2: [("mixed", 1), ("mixed", 2)],
}
"""Whose gradient is taken, and the micro-batch."""
Results = dict[int, Outcomes]


def cells(names: Any, default: dict[int, tuple[str, ...]]) -> pytest.MarkDecorator:
    """Each case on one worker and on two."""
    every = [(name, workers) for name in names for workers in (1, 2)]
    return pytest.mark.parametrize(
        ("name", "workers"), tiered(every, [cell for cell in every if cell[0] in default[cell[1]]])
    )


def cases(store: str, workers: int, is_long: bool) -> list[Case]:
    """Engines straight on, some of them stopped within an iteration and resumed."""
    resumed = RESUMED if is_long else RESUMED_BY_DEFAULT[workers]
    # A resume needs an iteration before the stop and one after it.
    iterations = {name: {"iterations": 3 if name in resumed else 2 if is_long else 1} for name in VARIANTS}
    found: list[Case] = [
        {"name": name, "do": "straight", **VARIANTS[name], **iterations[name]}
        for name in (VARIANTS if is_long else DEFAULT[workers])
    ]
    found += [
        {"name": f"resume-{name}", "do": "resume", "stop_at": STEPS_PER_ITERATION + 1, **VARIANTS[name]}
        | iterations[name]
        for name in resumed
    ]
    found += [
        {"name": f"gradient-{name}-{micro_batch}", "do": "gradient", "engine": "plain", "micro_batch": micro_batch}
        | {"settings": settings}
        for name, micro_batch in GRADIENTS[workers]
        for settings in [TEXT if name == "mixed" else {"text_coef": 0.0}]
    ]
    return [{**case, "stage": f"{case['name']}-{workers}", "store": store} for case in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """What one worker and two workers found."""
    store = str(tmp_path_factory.mktemp("ppo") / "store")
    is_long = wants_long(request)
    return {
        workers: run_cases(run, workers, cases(store, workers, is_long), tmp_path_factory.mktemp(f"ppo{workers}"))
        for workers in (1, 2)
    }


def first_iteration(outcome: Outcome) -> list[dict[str, float]]:
    """The rollouts before any update, and the metrics of the updates on them."""
    heard = [values for step, values in outcome["heard"] if step <= STEPS_PER_ITERATION]
    return [values for values in heard if values.get("iteration", 0.0) == 0.0]


@cells(FP32, DEFAULT)
def test_the_first_iteration_is_the_same_everywhere(results: Results, name: str, workers: int) -> None:
    kind = name.rpartition("-")[0]
    wanted = first_iteration(results[1][f"{kind}-plain" if kind else "plain"])
    found = first_iteration(results[workers][name])
    assert len(found) == len(wanted) == 1 + STEPS_PER_ITERATION
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


@cells(VARIANTS, DEFAULT)
def test_every_iteration_begins_with_ratios_of_exactly_one(results: Results, name: str, workers: int) -> None:
    heard = results[workers][name]["heard"]
    largest = {step: values["log_ratio_max"] for step, values in heard if "log_ratio_max" in values}
    assert [step for step, value in largest.items() if value == 0] == list(range(1, len(largest), STEPS_PER_ITERATION))
    assert len(largest) in [iterations * STEPS_PER_ITERATION for iterations in (1, 2, 3)]


@cells(RESUMED, RESUMED_BY_DEFAULT)
def test_resumed_equals_straight_to_the_bit(results: Results, name: str, workers: int) -> None:
    straight, resumed = results[workers][name], results[workers][f"resume-{name}"]
    assert resumed["preempted"]
    assert resumed["digest"] == straight["digest"]
    assert all(line in straight["heard"] for line in resumed["heard"])
    assert resumed["heard"][0][1]["iteration"] == 2.0


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_text_in_the_loss_adds_its_gradient(results: Results, workers: int, micro_batch: int) -> None:
    mixed = np.array(results[workers][f"gradient-mixed-{micro_batch}"]["gradient"])
    alone = np.array(results[1]["gradient-alone-2"]["gradient"])
    text = np.array(results[1]["gradient-mixed-2"]["text"])
    assert np.abs(TEXT_COEF * text).max() > 0.1 * np.abs(alone).max() > 0
    np.testing.assert_allclose(mixed, alone + TEXT_COEF * text, atol=1e-5 * np.abs(mixed).max())
