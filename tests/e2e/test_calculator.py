"""A policy that has seen a tool used learns to use it, and what it sampled on the way can be recomputed."""

from collections.abc import Callable

import pytest

from tests.e2e.shell import PROJECT, Shell

RECIPE = PROJECT / "recipes" / "llm" / "grpo_calculator.yaml"


@pytest.mark.long
def test_a_policy_learns_to_use_the_calculator(make_shell: Callable[..., Shell]) -> None:
    shell = make_shell()
    done = shell("run", str(RECIPE), "--set", "cluster.workers=1", "--set", "cluster.gpus_per_worker=0")
    assert done.code == 0, done.out + done.err
    (run,) = [item["run"] for item in shell("status", "--json").json]
    metrics = shell("store", "show", f"{run}/policy", "--json").json["metrics"]
    start, end = metrics["start"], metrics["end"]
    assert start["reward/right"] < 0.3
    assert end["reward/right"] > 0.5
    assert start["turns_mean"] < 1.5 < 1.9 < end["turns_mean"]
    for iteration in (0, 20, 40):
        again = shell("store", "replay", f"{run}/policy", "--iteration", str(iteration), "--json")
        assert again.code == 0, again.out + again.err
        assert again.json["is_equal"]
        assert bool(again.json["drawn"]) == (iteration != 20)
