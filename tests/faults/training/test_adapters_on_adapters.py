"""Stages in bf16 on an adapter that stays unmerged: ZeRO 0, 2 and 3, one worker and two, killed and resumed."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainers.store.store import Store
from trainers.training.context import Check, verify_checks

pytestmark = pytest.mark.timeout(1800)  # the module's stages run in the first test

INPUTS = {"base": {}, "chat": {"init_from": "base"}, "judge": {"init_from": "chat"}}
INPUTS |= {"policy": {"actor": "chat", "reward": "judge-zero2"}}
ZERO = (0, 2, 3)
PLAIN = {"engine": "plain", "zero": "auto"}
DEATHS = {
    "judge": {"rank": 1, "phase": "backward", "step": 3},
    "policy": {"rank": 0, "phase": "rollout", "step": 8},
}
LOSS_LIMIT = 5e-3
"""As for bf16 under every engine in tests/numerics/test_training.py."""


def case(name: str, stage: str, shard: dict[str, Any], *, workers: int = 2, **more: Any) -> dict[str, Any]:
    """A stage in bf16 under a name of its own."""
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    parts = {"stage": stage, "run": name, "inputs": INPUTS[stage], "fingerprint": fingerprint}
    groups = 1 + len(more.get("deaths", []))
    shards = [{"precision": "bf16", **shard}] * groups
    if stage == "judge":  # at the chain's own rate a gradient's sign, which bf16 may turn, moves the first steps
        train = {"steps": 6, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-3}, "save_every": 2}
        more |= {"stage_settings": {"train": {**train, "evaluation_rows": 4}}}
    return {"name": name, **parts, "workers": [workers] * groups, "shards": shards, "name_as": name, **more}


CASES = [
    case("base", "base", PLAIN, workers=1),
    case("chat", "chat", PLAIN, workers=1),
    case("judge-plain", "judge", PLAIN, workers=1),
    *(case(f"judge-zero{zero}", "judge", {"zero": zero}) for zero in ZERO),
    case("policy-zero3", "policy", {"zero": 3}),
    *(case(f"{stage}-killed", stage, {"zero": 3}, deaths=[death], name_as=None) for stage, death in DEATHS.items()),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stacked")


@pytest.fixture(scope="module")
def results(make_stage_runner: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = make_stage_runner(folder)(CASES)
    for name, outcome in found.items():
        assert "error" not in outcome, f"{name}: {outcome['error']}"
    return found


def losses(outcome: dict[str, Any]) -> list[float]:
    """The loss of every step."""
    steps = sorted(outcome["values"], key=int)
    return [line["loss"] for step in steps for line in outcome["values"][step] if "loss" in line]


@pytest.mark.parametrize("zero", ZERO)
def test_every_zero_stage_trains_alike(results: dict[str, Any], zero: int) -> None:
    wanted, found = losses(results["judge-plain"]), losses(results[f"judge-zero{zero}"])
    assert len(wanted) == len(found) > 0
    assert found == pytest.approx(wanted, rel=LOSS_LIMIT)


@pytest.mark.parametrize("stage", list(DEATHS))
def test_a_killed_stage_makes_the_same_bytes(results: dict[str, Any], stage: str) -> None:
    found = results[f"{stage}-killed"]
    assert found["digest"] == results[f"{stage}-zero3"]["digest"]
    assert found["firsts"], "nothing was restored"


@pytest.mark.parametrize("name", ["judge-plain", "judge-zero2", "judge-zero3", "policy-zero3"])
def test_what_was_made_is_verified_on_all_adapters(results: dict[str, Any], folder: Path, name: str) -> None:
    store = Store.open(str(folder / "store"))
    made = store.resolve(name)
    assert made.stack == [store.resolve(below).digest for below in ("base", "chat")]
    inputs = {path: store.resolve(below) for path, below in INPUTS[name.split("-")[0]].items()}
    checks = [Check.from_json(raw) for raw in results[name]["checks"]]
    assert any(check.stack for check in checks)
    verify_checks(store, made.files, checks, inputs, store.uri)
