"""Every shipped recipe is right, and runs to its end in its smoke size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden.runs import FEWER

pytestmark = pytest.mark.serial

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALWAYS = ("llm/files.yaml", "llm/smollm2.yaml")
"""The others run in the long form; their architectures and engines have tests of their own."""
SHIPPED = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml") if path.name != "quickstart.yaml")
REAL = {"llm/smollm2.yaml": ("smollm2", "smollm2"), "text/minilm_polarity.yaml": ("minilm", "minilm")}
"""Recipes that start from a real model: the fixture that has its folder, and its name in the store."""
CASES = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.long) for name in SHIPPED]


@pytest.mark.parametrize("recipe", CASES)
def test_a_shipped_recipe_runs_in_its_smoke_size(
    make_shell: Callable[..., Any],
    say: Callable[[str], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    recipe: str,
) -> None:
    shell = make_shell()
    if recipe.startswith("image/vision_language"):
        _import_small_llava(shell, tmp_path / "eyes")
    if recipe in REAL:
        fixture, name = REAL[recipe]
        assert shell("store", "import", str(request.getfixturevalue(fixture)), "--name", name).code == 0
    fewer = [part for change in FEWER.get(recipe, ()) for part in ("--set", change)]
    done = shell("run", str(RECIPES / recipe), "--smoke", *fewer)
    assert done.code == 0, done.out + done.err
    say(f"{recipe} --smoke took {done.seconds:.0f} s")
    (status,) = shell("status", "--json").json
    assert {stage["state"] for stage in status["stages"]} == {"committed"}


def _import_small_llava(shell: Any, folder: Path) -> None:
    """Give the store the model that the recipes start from."""
    from trainers.models.small_llava import DIGIT_TEXTS, write_small_llava

    write_small_llava(folder, DIGIT_TEXTS)
    assert shell("store", "import", str(folder), "--name", "eyes").code == 0
