"""What people are shown of a kind of stage is what such stages report: the recorded runs of shipped recipes say so."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from launch.runs.heartbeat import BEAT_KEYS
from recipes.loading.load import load_recipe
from recipes.stages.base import StageBase
from recipes.stages.kinds import STAGE_CLASSES, Stage, first_curves

ROOT = Path(__file__).parents[3]
HELD_OUT = "eval/"


@pytest.fixture(scope="module")
def reported() -> dict[type[StageBase], set[str]]:
    """Names of the metrics that recorded stages of each class report, held-out ones and an evaluation's under their
    bare names."""
    found: dict[type[StageBase], set[str]] = {}
    for path in sorted((ROOT / "tests" / "golden" / "runs").glob("*.json")):
        for name, runs in json.loads(path.read_text())["recipes"].items():
            stages = load_recipe(ROOT / "recipes" / name, smoke=True).recipe.stages
            for stage, run in runs.items():
                names = {curve.removeprefix(HELD_OUT).rpartition(".")[2] for curve in run["curves"]}
                found.setdefault(type(stages[stage]), set()).update(names)
    return found


def test_every_class_of_the_union_is_listed() -> None:
    def classes(annotation: Any) -> set[type]:
        inner = get_args(annotation)
        return set().union(*map(classes, inner)) if inner else {annotation} & {*_subclasses(StageBase)}

    assert classes(Stage) == set(STAGE_CLASSES)


def _subclasses(base: type) -> list[type]:
    return [base, *(found for child in base.__subclasses__() for found in _subclasses(child))]


def test_recorded_runs_have_a_stage_of_every_kind(reported: dict[type[StageBase], set[str]]) -> None:
    assert {stage.model_fields["kind"].annotation for stage in reported} == {
        stage.model_fields["kind"].annotation for stage in STAGE_CLASSES
    }


@pytest.mark.parametrize("stage", STAGE_CLASSES, ids=lambda stage: stage.__name__)
def test_metrics_that_are_shown_are_reported(stage: type[StageBase], reported: dict[type[StageBase], set[str]]) -> None:
    if stage not in reported:
        pytest.skip("no such stage is recorded")
    names = reported[stage] | ({"score"} if "score_mean" in reported[stage] else set())
    assert set(stage.shown) <= names
    missing = set(stage.curves) - names
    assert missing <= RARE.get(stage.__name__, set()), "a curve that no recorded stage of this kind has"


RARE = {"Evaluate": {"loss"}, "Preference": {"kl"}}
"""Curves of families and losses that no recorded run has."""


def test_curves_that_any_kind_puts_first_are_first_in_each_that_has_them(
    reported: dict[type[StageBase], set[str]],
) -> None:
    known = {name for stage in STAGE_CLASSES for name in stage.curves}
    for stage, names in reported.items():
        (kind,) = stage.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
        assert names & known <= set(first_curves(kind)), stage.__name__


def test_whatever_a_stage_counts_and_shows_reaches_the_driver() -> None:
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        for stage in load_recipe(path, smoke=True).recipe.stages.values():
            assert _shown_keys(stage) <= set(BEAT_KEYS)


def _shown_keys(stage: Stage) -> set[str]:
    return {f"{stage.progress().counted}_per_s", *stage.shown}
