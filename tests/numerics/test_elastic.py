"""A stage that goes on with another number of workers and another ZeRO stage: same samples, same bits, same curve."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.small_chain import Case, Death, Outcome, SmallChain

WORKERS = (1, 2, 3, 1)
ZERO = (0, 3, 1, 2)
STEPS = 8
LIMIT = 1e-5
TRAIN = {
    "steps": STEPS, "global_batch": 12, "sequence_length": 64, "optimizer": {"lr": 1e-3}, "save_every": 1,
    "evaluate_every": 100, "evaluation_rows": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> SmallChain:
    """A folder for all cases but the policy's."""
    return SmallChain(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def policy_parents(tmp_path_factory: pytest.TempPathFactory) -> SmallChain:
    """Where a policy's model and its judge are."""
    made = SmallChain(tmp_path_factory.mktemp("policy"))
    made.run([Case(name, name, name, name_as=name, workers=[1]) for name in ("base", "chat", "judge")])
    return made


def case(stage: str, run: str, **more: Any) -> Case:
    """A stage of the small chain with its own steps and no dropout; one worker and ZeRO-0 unless it says otherwise."""
    settings: dict[str, Any] = {"train": TRAIN, "shard": {"engine": "deepspeed"}}
    if stage == "chat":
        settings["lora"] = {"r": 4}
    return Case(run, stage, run, **{"workers": [1], "shards": [{"zero": 0}], "settings": settings, **more})


def moved(stage: str) -> Case:
    """The same, killed three times; each attempt on another number of workers and in another ZeRO stage."""
    deaths = [Death(0, "train", step) for step in (2, 4, 6)]
    return case(stage, f"{stage}-moved", deaths=deaths, workers=WORKERS, shards=[{"zero": zero} for zero in ZERO])


def losses_of(outcome: Outcome, step: int) -> list[float]:
    """The losses that were heard after a step, once an attempt; one that is not finite is not heard of."""
    lines = outcome.values[step]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == len([line for line in lines if "weight" in line]) >= 1, f"no loss after step {step}"
    return losses


def check(straight: Outcome, found: Outcome, dealt_by_length: bool = False) -> float:
    """Compare; returns the largest relative difference of the losses.

    Ids stand rank after rank. Where a step's rows are dealt by length, their place in that list depends on the number
    of workers: the rows of each step are compared, not their places.
    """

    def order(ids: list[int]) -> list[int]:
        return sorted(ids) if dealt_by_length else ids

    assert len(found.firsts) == 3
    assert all(same == [True] for same in found.restored.values()), "tensors differ right after a load"
    assert found.ids.keys() == straight.ids.keys()
    for step, lines in found.ids.items():
        assert all(order(line) == order(straight.ids[step][0]) for line in lines), (
            f"other samples, or another order, in step {step}"
        )
    differences: list[float] = []
    for step in range(1, STEPS + 1):
        (wanted,) = losses_of(straight, step)
        differences += [abs(loss - wanted) / abs(wanted) for loss in losses_of(found, step)]
    assert all(value < LIMIT for value in differences), differences
    assert found.result.exactness.startswith("order-exact")
    return max(differences)


def test_workers_and_zero_stages_may_change_on_the_way(chain: SmallChain, say: Callable[[str], None]) -> None:
    found = chain.run([case("base", "base-straight"), moved("base")])
    largest = check(found["base-straight"], found["base-moved"])
    say(f"pretrain on 1, 2, 3, 1 workers, ZeRO 0, 3, 1, 2: losses differ by {largest:.1e}")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_stage_without_sampling_may_change(chain: SmallChain, say: Callable[[str], None]) -> None:
    jobs = [case(stage, f"{stage}-straight", name_as=stage) for stage in ("base", "chat", "judge")]
    found = chain.run([*jobs, moved("chat"), moved("judge")])
    for stage in ("chat", "judge"):
        largest = check(found[f"{stage}-straight"], found[f"{stage}-moved"], dealt_by_length=stage == "judge")
        say(f"{stage} on 1, 2, 3, 1 workers, ZeRO 0, 3, 1, 2: losses differ by {largest:.1e}")


def report_of(outcome: Outcome, step: int) -> list[dict[str, float]]:
    """What was measured of the rollouts that follow a step, once an attempt."""
    return [line for line in outcome.values[step] if "iteration" in line]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("workers", "zero"), [((2, 1), (2, 3)), ((1, 2), (3, 0)), ((2, 2), (2, 0))])
def test_a_policy_may_change_up_to_its_first_update(
    policy_parents: SmallChain, say: Callable[[str], None], workers: tuple[int, int], zero: tuple[int, int]
) -> None:
    """Killed in the second iteration's updates, which are done again elsewhere: the same weights draw the same text."""
    shards = [{"zero": stage} for stage in zero]
    run = f"policy-{workers}-{zero}".translate(str.maketrans("(),", "---")).replace(" ", "")
    cases = [
        Case("straight", "policy", f"{run}s", workers=workers[:1], shards=shards[:1]),
        Case("moved", "policy", run, deaths=[Death(0, "forward", 6)], workers=workers, shards=shards),
    ]
    straight, found = policy_parents.run(cases).values()
    assert found.firsts == [4]
    assert found.restored == {4: [True]}
    assert [sorted(ids) for ids in found.ids[4]] == [sorted(straight.ids[4][0])] * 2
    (wanted,) = report_of(straight, 4)
    reports = report_of(found, 4)
    assert len(reports) == 2, "the second attempt drew no text"
    for report in reports:
        assert report.keys() == wanted.keys()
        for name, value in wanted.items():
            assert report[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert found.result.outcome["state"] == "completed"
    assert found.result.exactness.startswith("order-exact")
    say(f"policy on {workers} workers, ZeRO {zero}: the same {len(wanted)} measurements of the second rollouts")
