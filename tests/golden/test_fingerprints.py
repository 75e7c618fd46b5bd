"""What a recipe's stages mean, and so their fingerprints, are what they were: `python -m tests.golden.fingerprints`."""

import pytest

from tests.golden.fingerprints import differences, load, record_recipe, shipped_recipes

CHANGED = "\nwhere that is meant: python -m tests.golden.fingerprints\n"


def test_every_shipped_recipe_is_recorded() -> None:
    assert {key.partition(" ")[0] for key in load()} == set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_fingerprints_are_what_they_were(name: str) -> None:
    recorded = {key: value for key, value in load().items() if key.startswith(f"{name} ")}
    changed = differences(recorded, record_recipe(name))
    assert not changed, CHANGED + "\n".join(changed)
