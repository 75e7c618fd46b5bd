"""Every shipped recipe is right, and runs to its end in its smoke size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if path.name != "quickstart.yaml")


@pytest.mark.serial
@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_shipped_recipe_runs_in_its_smoke_size(
    make_shell: Callable[..., Any], say: Callable[[str], None], recipe: Path
) -> None:
    shell = make_shell()
    done = shell("run", str(recipe), "--smoke")
    assert done.code == 0, done.out + done.err
    say(f"{recipe.relative_to(RECIPES)} --smoke took {done.seconds:.0f} s")
    (status,) = shell("status", "--json").json
    assert {stage["state"] for stage in status["stages"]} == {"committed"}
