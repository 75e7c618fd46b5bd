"""Order, planned numbers, what is cached, and which worker counts fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.loading.load import load_recipe, parse_recipe
from recipes.planning.plan import Committed, Plan, build_plan, divides, fit_workers
from recipes.recipe import Recipe
from recipes.rules.chain import edges, order
from recipes.stages.batch import micro_batches
from recipes.stages.train import Train

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def _train(**given: Any) -> Train:
    defaults = {"global_batch": 4, "sequence_length": 16, "optimizer": {"lr": 0.1}}
    return Train.model_validate({**defaults, **given})


def _digests(recipe: Recipe) -> dict[str, dict[str, str]]:
    return {name: {use.field_path: "d" for use in stage.sources()} for name, stage in recipe.stages.items()}


def _plan(recipe: Recipe, done: dict[str, Committed] | None = None, workers: int = 2) -> Plan:
    return build_plan(recipe, workers=workers, data=_digests(recipe), find=(done or {}).get)


@given(st.integers(1, 4096), st.integers(1, 64))
def test_derived_batches_multiply_out(share: int, workers: int) -> None:
    micro, accumulation = micro_batches(share * workers, workers)
    assert micro * accumulation * workers == share * workers
    assert micro <= 16
    assert not any(share % size == 0 for size in range(micro + 1, min(share, 16) + 1))


def test_batches_that_do_not_divide() -> None:
    assert micro_batches(24, 2, 6) == (6, 2)
    with pytest.raises(ValueError, match="among 5 workers"):
        micro_batches(24, 5)
    with pytest.raises(ValueError, match=r"24 / 2 = 12"):
        micro_batches(24, 2, 5)


def test_planned_steps() -> None:
    assert _train(steps=7).planned_steps() == 7
    assert _train(tokens=64).planned_steps() == 1
    assert _train(tokens=65).planned_steps() == 2
    assert _train(epochs=1.5).planned_steps() is None
    assert _train(epochs=1.5).planned_steps(rows=10) == 4
    assert _train(epochs=0.01).planned_steps(rows=10) == 1


@given(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=8), st.randoms())
def test_parents_come_first(picks: list[list[int]], random: Any) -> None:
    """Any acyclic chain: stage i may name stages below i; the recipe lists them in any order."""
    stages: dict[str, Any] = {}
    for index, chosen in enumerate(picks):
        parents = [f"s{pick}" for pick in dict.fromkeys(chosen) if pick < index]
        if parents:
            data = {"source": "python-docs"}
            train = {"steps": 1, "global_batch": 1, "sequence_length": 8, "optimizer": {"lr": 0.1}}
            stages[f"s{index}"] = {"kind": "finetune", "init_from": parents[0], "data": data, "train": train}
            if len(parents) > 1:
                stages[f"s{index}"] = {"kind": "evaluate", "of": parents}
        else:
            stages[f"s{index}"] = {"kind": "evaluate", "of": ["store://x"]}
    names = list(stages)
    random.shuffle(names)
    recipe = parse_recipe({"name": "r", "stages": {name: stages[name] for name in names}})
    ordered = order(recipe)
    assert sorted(ordered) == sorted(names)
    assert all(ordered.index(edge.parent) < ordered.index(edge.stage) for edge in edges(recipe.stages))


def test_order_of_a_circle_raises() -> None:
    stages = {"a": {"kind": "evaluate", "of": ["b"]}, "b": {"kind": "evaluate", "of": ["a"]}}
    with pytest.raises(ValueError, match="a, b"):
        order(parse_recipe({"name": "r", "stages": stages}))


def test_the_quickstart_plan() -> None:
    recipe = load_recipe(QUICKSTART).recipe
    plan = _plan(recipe)
    assert [stage.name for stage in plan.stages] == ["base", "sft", "reward", "second_reward", "policy", "eval"]
    for stage in plan.stages:
        planned = recipe.stages[stage.name]
        assert stage.steps == planned.steps()
        if stage.micro_batch is not None and stage.accumulation is not None:
            assert (batch := planned.batch()) is not None
            assert stage.micro_batch * stage.accumulation * 2 == batch.size
        assert stage.sizes is not None
        assert stage.sizes.disk_bytes > 0
        best = 4 * stage.sizes.trainable_parameters if stage.name == "policy" else 0  # its kl_limit keeps the best one
        assert stage.sizes.state_bytes == 12 * stage.sizes.trainable_parameters + best
        assert stage.sizes.save_buffer_bytes == -(-12 * stage.sizes.trainable_parameters // stage.workers) + 2 * best
        assert stage.sizes.cpu_worker_bytes - stage.sizes.memory_per_worker_bytes == stage.sizes.save_buffer_bytes
    inputs = {stage.name: stage.inputs for stage in plan.stages}
    assert inputs["policy"]["rewards.judge.model"].fingerprint == plan.stages[2].fingerprint
    assert inputs["eval"]["of.1"].part == "actor"
    assert not any(stage.cached for stage in plan.stages)
    assert json.loads(json.dumps(plan.to_json()))["stages"][0]["name"] == "base"


def _committed(plan: Plan) -> dict[str, Committed]:
    """A store in which every stage of the plan is done."""
    digests = {stage.fingerprint: f"digest of {stage.name}" for stage in plan.stages}
    return {
        stage.fingerprint: Committed(
            digests[stage.fingerprint], {path: digests[item.fingerprint] for path, item in stage.inputs.items()}
        )
        for stage in plan.stages
    }


def test_a_finished_recipe_is_cached_and_a_change_re_runs_what_follows() -> None:
    recipe = load_recipe(QUICKSTART).recipe
    done = _committed(_plan(recipe))
    assert all(stage.cached for stage in _plan(recipe, done).stages)
    assert all(stage.cached for stage in _plan(recipe, done, workers=1).stages)
    changed = load_recipe(QUICKSTART, ["stages.policy.algorithm.kl_coef=0.123"]).recipe
    assert [stage.name for stage in _plan(changed, done).stages if not stage.cached] == ["policy", "eval"]
    changed = load_recipe(QUICKSTART, ["stages.base.shard.zero=0", "stages.base.train.save_every=1"]).recipe
    assert all(stage.cached for stage in _plan(changed, done).stages)


def test_a_stage_whose_parent_has_another_digest_is_not_done() -> None:
    recipe = load_recipe(QUICKSTART).recipe
    plan = _plan(recipe)
    done = _committed(plan)
    chat = plan.stages[1].fingerprint
    done[chat] = Committed("another digest", done[chat].parents)
    assert [stage.name for stage in _plan(recipe, done).stages if stage.cached] == ["base", "sft", "second_reward"]


def test_auto_workers_divide_every_batch() -> None:
    recipe = load_recipe(QUICKSTART).recipe
    for available in range(1, 12):
        workers = fit_workers(recipe, available)
        assert 1 <= workers <= available
        assert all(divides(workers, stage) for stage in recipe.stages.values())
    odd = load_recipe(QUICKSTART, ["stages.sft.train.global_batch=33"]).recipe
    assert fit_workers(odd, 2) == 1
    plain = load_recipe(QUICKSTART, ["stages.sft.shard.engine=plain"]).recipe
    assert fit_workers(plain, 8) == 8, "plain workers sum their gradients up"
    fixed = load_recipe(QUICKSTART, ["cluster.workers=4"]).recipe
    assert fit_workers(fixed, 1) == 4
