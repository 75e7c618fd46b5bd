"""Every shipped recipe is right, and runs to its end in its smoke size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.shell import Shell
from tests.golden.runs import FEWER, load
from tests.tiers import tiered
from trainers.store.store import Store

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALWAYS = ("llm/files.yaml", "llm/smollm2.yaml", "text/minilm_polarity.yaml")
"""A chain, and the recipes that start from real models. The others run in the long form; their architectures and
engines have tests that are for them alone."""
SHIPPED = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml") if path.name != "quickstart.yaml")
REAL = {
    "llm/smollm2.yaml": ("smollm2", "smollm2"),
    "llm/evaluation.yaml": ("smollm2", "smollm2"),
    "llm/smollm2_rl.yaml": ("smollm2", "smollm2"),
    "text/minilm_polarity.yaml": ("minilm", "minilm"),
}
"""Recipes that start from a real model: the fixture that has its folder, and its name in the store."""
ON_ONE = ("cluster.workers=1", "cluster.gpus_per_worker=0")
AS_RECORDED = "llm/files.yaml"
"""Runs on one worker in fp32, as what tests/golden recorded did; the quickstart runs on two."""


@pytest.mark.parametrize("recipe", tiered(SHIPPED, ALWAYS))
def test_a_shipped_recipe_runs_in_its_smoke_size(
    make_shell: Callable[..., Shell],
    say: Callable[[str], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    recipe: str,
) -> None:
    shell = make_shell()
    if recipe.startswith("image/vision_language"):
        _import_small_llava(shell, tmp_path / "eyes")
    changes = [*FEWER.get(recipe, ()), *(ON_ONE if recipe in ALWAYS else ())]
    if recipe in REAL:
        fixture, name = REAL[recipe]
        assert shell("store", "import", str(request.getfixturevalue(fixture)), "--name", name).code == 0
    stages: dict[str, Any] = {}
    if recipe == AS_RECORDED:
        stages = ((load() or {}).get("recipes") or {}).get(recipe, {})
        changes += [f"stages.{stage}.shard.precision=fp32" for stage in stages]
    done = shell("run", str(RECIPES / recipe), "--smoke", *(part for change in changes for part in ("--set", change)))
    assert done.code == 0, done.out + done.err
    say(f"{recipe} --smoke took {done.seconds:.0f} s")
    (status,) = shell("status", "--json").json
    assert {stage["state"] for stage in status["stages"]} == {"committed"}
    made = {item.stage: item.digest for item in Store.open(str(shell.store)).list_artifacts()}
    recorded = {stage: item["digest"] for stage, item in stages.items()}
    assert {stage: made[stage] for stage in recorded} == recorded, "a run on Ray makes what one without it made"


def _import_small_llava(shell: Shell, folder: Path) -> None:
    """Give the store the model that the recipes start from."""
    from trainers.models.small_llava import DIGIT_TEXTS, write_small_llava

    write_small_llava(folder, DIGIT_TEXTS)
    assert shell("store", "import", str(folder), "--name", "eyes").code == 0
