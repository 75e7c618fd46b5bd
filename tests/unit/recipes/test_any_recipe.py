"""Whatever a recipe holds, the check answers with problems or none, never with a traceback."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.loading.load import check_file, dump_recipe, load_recipe

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20),
    st.sampled_from(
        ["base", "chat", "policy", "policy.critic", "store://x", "./x", "hf://a/b@c", "auto", "python-docs"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def resolved(write_recipe: Callable[..., Path]) -> tuple[Path, dict[str, Any]]:
    path = write_recipe()
    return path, dump_recipe(load_recipe(path).recipe)


def _change(value: Any, randomness: random.Random, replacement: Any) -> None:
    """Replace, remove or add one thing at a random place."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = randomness.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and randomness.random() < 0.8:
            value = value[key]
            continue
        choice = randomness.random()
        if choice < 0.2:
            del value[key]
        elif choice < 0.3 and isinstance(value, dict):
            value[str(replacement)[:20]] = value[key]
        else:
            value[key] = replacement
        return


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**32), VALUES), min_size=1, max_size=3), as_smoke=st.booleans())
def test_a_changed_recipe(
    resolved: tuple[Path, dict[str, Any]], changes: list[tuple[int, Any]], as_smoke: bool
) -> None:
    path, data = resolved
    changed = json.loads(json.dumps(data))
    for seed, replacement in changes:
        _change(changed, random.Random(seed), replacement)
    other = path.with_name("changed.yaml")
    other.write_text(json.dumps(changed, ensure_ascii=False), encoding="utf-8")
    loaded, problems = check_file(other, smoke=as_smoke)
    assert (loaded is None) == bool(problems)
    for problem in problems:
        assert problem.message
        assert "\n" not in str(problem)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text("abcdefghilmnoprstuvz._-0123456789", max_size=40), value=st.text(max_size=20))
def test_any_setting(resolved: tuple[Path, dict[str, Any]], path: str, value: str) -> None:
    check_file(resolved[0], [f"{path}={value}", f"stages.base.{path}={value}"])
