"""The smoke form keeps the chain and is small."""

from pathlib import Path

import pytest

from recipes.loading.load import check_file, dump_recipe, load_recipe, parse_recipe
from recipes.planning.plan import fit_workers
from recipes.planning.smoke import shrink
from recipes.stages.evaluate import Evaluate
from recipes.stages.pretrain import Pretrain
from recipes.stages.reward import Reward
from recipes.stages.rl import RlText

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml")) + sorted(RECIPES.glob("*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_shrinks(path: Path) -> None:
    original = load_recipe(path).recipe
    small = load_recipe(path, smoke=True).recipe
    assert {name: stage.kind for name, stage in small.stages.items()} == {
        name: stage.kind for name, stage in original.stages.items()
    }
    assert shrink(small) == small, "shrinking twice is shrinking once"
    assert parse_recipe(dump_recipe(small)) == small, "the smoke form is a valid recipe"
    assert check_file(path, smoke=True)[1] == []
    assert fit_workers(small, 2) == 2
    for stage in small.stages.values():
        assert (stage.steps() or 0) <= 10
        if isinstance(stage, Pretrain) and stage.architecture is not None:
            assert stage.architecture.num_parameters(512) < 200_000
        if isinstance(stage, Reward):
            assert stage.min_accuracy == 0
        if isinstance(stage, RlText):
            assert stage.algorithm.kl_limit is None
            assert stage.algorithm.iterations >= 2, "a second iteration is where an update first shows"
        if isinstance(stage, Evaluate):
            assert stage.gates == []
            assert stage.num_prompts <= 16


def test_engines_and_seams_stay() -> None:
    path = RECIPES / "quickstart.yaml"
    original, small = load_recipe(path).recipe, load_recipe(path, smoke=True).recipe
    for name, stage in original.stages.items():
        assert small.stages[name].shard == stage.shard
        assert getattr(small.stages[name], "lora", None) == getattr(stage, "lora", None)
        assert small.stages[name].seed == stage.seed
