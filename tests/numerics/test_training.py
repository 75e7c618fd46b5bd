"""Equal numbers: plain engine and ZeRO 0-3, one worker and two, straight and resumed, with and without LoRA."""

import math
from typing import Any

import pytest

from tests.numerics.outcomes import Case, Outcomes, run_cases
from tests.numerics.training_cases import run
from tests.tiers import tiered, wants_long

ZERO = (0, 1, 2, 3)
FP32_LIMIT = 1e-5
BF16_LIMIT = 5e-3


def deepspeed(zero: int, **more: Any) -> Case:
    """Name a case of the sharded engine."""
    return {"engine": "deepspeed", "zero": zero, **more}


ENGINES: dict[str, Case] = {"plain": {"engine": "plain"}} | {f"zero{zero}": deepspeed(zero) for zero in ZERO}
CURVES: dict[str, Case] = {
    **ENGINES,
    **{f"{name}-bf16": {**engine, "precision": "bf16"} for name, engine in ENGINES.items()},
    **{f"{name}-lora": {**ENGINES[name], "lora": True} for name in ("plain", "zero2", "zero3")},
    **{f"{name}-gpt2": {**ENGINES[name], "architecture": "gpt2"} for name in ("plain", "zero3")},
    "zero2-recompute": deepspeed(2, recompute=True),
}
ON_ONE = ("plain", "zero3", "plain-bf16", "plain-lora", "plain-gpt2")
"""Curves on one worker in the default tier; with one rank the ZeRO stages differ by their bookkeeping alone."""
ON_TWO = (*ENGINES, "plain-bf16", "zero2-bf16", "zero3-bf16", "zero3-lora", "zero3-gpt2", "zero2-recompute")
"""Curves on two workers in the default tier: every engine in fp32, and what is special about the sharded ones."""
STARTS = tuple(name for name in CURVES if name.endswith("-bf16"))
RESUMED: dict[str, Case] = {
    **{f"zero{zero}": deepspeed(zero) for zero in ZERO},
    **{f"zero{zero}-bf16": deepspeed(zero, precision="bf16") for zero in ZERO},
    **{f"zero{zero}-lora": deepspeed(zero, lora=True, dropout=0.1) for zero in (2, 3)},
}
RESUMED_BY_DEFAULT = ("zero0", "zero2-bf16", "zero3", "zero3-lora")
SKIPPED = {name: case for name, case in RESUMED.items() if "lora" not in name}
SKIPPED_BY_DEFAULT = ("zero2", "zero3-bf16")
MOVED_BY_DEFAULT = ("plain", "zero3")


def named(do: str, cases: dict[str, Case], **more: Any) -> list[Case]:
    """The cases, named for what is done."""
    return [{**case, **more, "name": f"{do}-{name}", "do": do} for name, case in cases.items()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the two-worker processes write and the one-worker processes read."""
    return str(tmp_path_factory.mktemp("numerics") / "store")


def chosen(cases: dict[str, Case], names: tuple[str, ...], is_long: bool) -> dict[str, Case]:
    """The cases of the tier."""
    return cases if is_long else {name: cases[name] for name in names}


@pytest.fixture(scope="module")
def two(store: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcomes:
    """What two workers found."""
    is_long = wants_long(request)
    curves = chosen(CURVES, ON_TWO, is_long)
    cases = [
        *named("curve", {**curves, "rank-means": deepspeed(2, objective="rank-means")}),
        *named("start", {name: case for name, case in curves.items() if name in STARTS}),
        *named("resume", chosen(RESUMED, RESUMED_BY_DEFAULT, is_long), store=store),
        *named("skip", chosen(SKIPPED, SKIPPED_BY_DEFAULT, is_long)),
        *named("gathered", {"zero2": deepspeed(2), "zero3": deepspeed(3)}),
        {"name": "saved", "do": "save", "store": store, **deepspeed(3)},
        {"name": "moved", "do": "continue", "stage": "saved", "store": store, **deepspeed(1)},
    ]
    return run_cases(run, 2, cases, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(
    store: str, two: Outcomes, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Outcomes:
    """What one worker found, in the store where two had been."""
    is_long = wants_long(request)
    curves = chosen(CURVES, ON_ONE, is_long)
    cases = [
        *named("curve", curves),
        *named("start", {name: case for name, case in curves.items() if name in STARTS}),
        *named("resume", {"plain": ENGINES["plain"]}, store=store),
        *named("continue", chosen(ENGINES, MOVED_BY_DEFAULT, is_long), store=store, stage="saved"),
    ]
    return run_cases(run, 1, cases, tmp_path_factory.mktemp("one"))


def difference(found: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    assert len(found) == len(wanted) > 0
    differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    assert all(map(math.isfinite, differences)), differences  # max() passes over a nan
    return max(differences)


def on_workers(*names: str) -> pytest.MarkDecorator:
    """Each curve on two workers and on one."""
    cells = [(name, workers) for name in names for workers in (2, 1)]
    default = {1: ON_ONE, 2: ON_TWO}
    return pytest.mark.parametrize(
        ("name", "workers"), tiered(cells, [cell for cell in cells if cell[0] in default[cell[1]]])
    )


@on_workers("plain", "zero0", "zero1", "zero2", "zero3", "zero2-recompute")
def test_every_engine_gives_the_plain_curve(one: Outcomes, two: Outcomes, name: str, workers: int) -> None:
    wanted = one["curve-plain"]
    assert wanted["losses"][0] - wanted["losses"][-1] >= 0.5
    found = {1: one, 2: two}[workers][f"curve-{name}"]
    assert difference(found["losses"], wanted["losses"]) < FP32_LIMIT
    assert difference(found["norms"], wanted["norms"]) < 1e-3


def test_means_per_rank_give_another_curve(one: Outcomes, two: Outcomes) -> None:
    assert difference(two["curve-rank-means"]["losses"], one["curve-plain"]["losses"]) > 10 * FP32_LIMIT


@on_workers(*STARTS)
def test_bf16_follows_the_fp32_curve(one: Outcomes, two: Outcomes, name: str, workers: int) -> None:
    found = {1: one, 2: two}[workers][f"curve-{name}"]["losses"]
    assert difference(found, one["curve-plain-bf16"]["losses"]) < BF16_LIMIT
    assert difference(found, one["curve-plain"]["losses"]) < 2e-2


@on_workers(*STARTS)
def test_masters_start_from_the_weights_before_rounding(one: Outcomes, two: Outcomes, name: str, workers: int) -> None:
    found = {1: one, 2: two}[workers][f"start-{name}"]
    assert sum(rank["elements"] for rank in found["ranks"]) == found["elements"]
    assert all(rank["off"] == 0.0 and rank["rounded"] for rank in found["ranks"])


@on_workers("plain-lora", "zero2-lora", "zero3-lora")
def test_lora_trains_alike_and_freezes_the_base(one: Outcomes, two: Outcomes, name: str, workers: int) -> None:
    wanted, found = one["curve-plain-lora"], {1: one, 2: two}[workers][f"curve-{name}"]
    assert wanted["frozen"] == 2 * 9 + 3
    assert difference(found["losses"], wanted["losses"]) < FP32_LIMIT
    assert found["frozen"] == wanted["frozen"]


@on_workers("zero3-gpt2")
def test_tied_weights_train_alike(one: Outcomes, two: Outcomes, name: str, workers: int) -> None:
    found = {1: one, 2: two}[workers][f"curve-{name}"]["losses"]
    assert difference(found, one["curve-plain-gpt2"]["losses"]) < FP32_LIMIT


@pytest.mark.parametrize("name", tiered(RESUMED, RESUMED_BY_DEFAULT))
def test_resumed_equals_straight_to_the_bit(two: Outcomes, name: str) -> None:
    found = two[f"resume-{name}"]
    assert found["steps"] == [4, 5, 6]
    assert found["first_rows"] == list(range(24, 32))
    assert found["resumed"] == found["straight"][3:]
    assert found["found"] == found["wanted"]
    assert found["memory"] == sum(range(1, 7))
    assert found["state"] == "completed"


def test_resumed_plain_equals_straight_to_the_bit(one: Outcomes) -> None:
    found = one["resume-plain"]
    assert found["resumed"] == found["straight"][3:]
    assert found["found"] == found["wanted"]


@pytest.mark.parametrize("name", tiered(ENGINES, MOVED_BY_DEFAULT))
def test_one_worker_continues_from_the_state_of_two(one: Outcomes, two: Outcomes, name: str) -> None:
    found = one[f"continue-{name}"]
    assert found["steps"][0] == 6
    assert difference(found["losses"], two["saved"]["losses"][5:]) < FP32_LIMIT


def test_another_zero_stage_continues_from_a_state(two: Outcomes) -> None:
    assert difference(two["moved"]["losses"], two["saved"]["losses"][5:]) < FP32_LIMIT


@pytest.mark.parametrize("name", tiered(SKIPPED, SKIPPED_BY_DEFAULT))
def test_a_non_finite_loss_on_one_rank_changes_nothing_anywhere(two: Outcomes, name: str) -> None:
    found = two[f"skip-{name}"]
    assert not found["applied"]
    assert found["unchanged"]
    assert found["skipped"] == 1
    assert found["applied_steps"] == 5
    assert found["equal_on_ranks"]
    assert all(loss < 10 for step, loss in enumerate(found["losses"]) if step != 2)
    assert found["message"].endswith("rows of the last one: 30, 31")


@pytest.mark.parametrize("zero", [2, 3])
def test_generation_between_steps_leaves_training_alone(two: Outcomes, zero: int) -> None:
    found = two[f"gathered-zero{zero}"]
    assert found["disturbed"] == found["quiet"]
