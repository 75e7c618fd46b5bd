"""Stages in bf16 on an adapter that stays unmerged: ZeRO 0, 2 and 3, one worker and two, killed and resumed."""

import hashlib
from typing import Any

import pytest

from tests.small_chain import Case, Death, Outcome, SmallChain
from tests.tiers import tiered, wants_long
from trainers.store.store import Store
from trainers.training.context import Check, verify_checks

pytestmark = pytest.mark.timeout(1800)  # the module's stages run in the first test

INPUTS = {"base": {}, "chat": {"init_from": "base"}, "judge": {"init_from": "chat"}}
INPUTS |= {"policy": {"actor": "chat", "rewards.judge.model": "judge-zero2"}}
ZERO = (0, 2, 3)
PLAIN = {"engine": "plain", "zero": "auto"}
DEATHS = {
    "judge": Death(1, "backward", 3),
    "policy": Death(0, "rollout", 8),
}
LOSS_LIMIT = 5e-3
"""As for bf16 under every engine in tests/numerics/test_training.py."""


def case(name: str, stage: str, shard: dict[str, Any], *, workers: int = 2, **more: Any) -> Case:
    """A stage in bf16 under a name of its own."""
    groups = 1 + len(more.get("deaths", []))
    settings: dict[str, Any] = {}
    if stage == "judge":  # at the chain's own rate a gradient's sign, which bf16 may turn, moves the first steps
        train = {"steps": 6, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-3}, "save_every": 2}
        settings = {"train": {**train, "evaluation_rows": 4}}
    parts = {"inputs": INPUTS[stage], "fingerprint": hashlib.sha256(name.encode()).hexdigest(), "settings": settings}
    parts |= {"workers": [workers] * groups, "shards": [{"precision": "bf16", **shard}] * groups, "name_as": name}
    return Case(name, stage, name, **{**parts, **more})


CASES = [
    case("base", "base", PLAIN, workers=1),
    case("chat", "chat", PLAIN, workers=1),
    case("judge-plain", "judge", PLAIN, workers=1),
    *(case(f"judge-zero{zero}", "judge", {"zero": zero}) for zero in ZERO),
    case("policy-zero3", "policy", {"zero": 3}),
    *(case(f"{stage}-killed", stage, {"zero": 3}, deaths=[death], name_as=None) for stage, death in DEATHS.items()),
]
LONG = ("judge-zero0", "judge-zero2", "policy-zero3", "policy-killed")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> SmallChain:
    return SmallChain(tmp_path_factory.mktemp("stacked"))


@pytest.fixture(scope="module")
def results(chain: SmallChain, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """What every case of the tier came to."""
    return chain.run([case for case in CASES if case.name not in LONG or wants_long(request)])


def losses(outcome: Outcome) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for step in sorted(outcome.values) for line in outcome.values[step] if "loss" in line]


@pytest.mark.parametrize("zero", tiered(ZERO, (3,)))
def test_every_zero_stage_trains_alike(results: dict[str, Outcome], zero: int) -> None:
    wanted, found = losses(results["judge-plain"]), losses(results[f"judge-zero{zero}"])
    assert len(wanted) == len(found) > 0
    assert found == pytest.approx(wanted, rel=LOSS_LIMIT)


@pytest.mark.parametrize("stage", tiered(DEATHS, ("judge",)))
def test_a_killed_stage_makes_the_same_bytes(results: dict[str, Outcome], stage: str) -> None:
    found = results[f"{stage}-killed"]
    assert found.result.digest == results[f"{stage}-zero3"].result.digest
    assert found.firsts, "nothing was restored"


@pytest.mark.parametrize(
    "name", tiered(("judge-plain", "judge-zero2", "judge-zero3", "policy-zero3"), ("judge-plain", "judge-zero3"))
)
def test_what_was_made_is_verified_on_all_adapters(results: dict[str, Outcome], chain: SmallChain, name: str) -> None:
    store = Store.open(str(chain.folder / "store"))
    made = store.resolve(name)
    assert made.stack == [store.resolve(below).digest for below in ("base", "chat")]
    inputs = {path: store.resolve(below) for path, below in INPUTS[name.split("-")[0]].items()}
    checks = [Check.from_json(raw) for raw in results[name].result.checks]
    assert any(check.stack for check in checks)
    verify_checks(store, made.files, checks, inputs, store.uri)
