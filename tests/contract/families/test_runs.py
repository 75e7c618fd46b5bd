"""Every family of the union by name runs to a verified candidate, and to the same bytes after a preemption."""

import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.models.families import FAMILIES as BUILT
from tests.stages import Case

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import LIMIT, RESUMED, RESUMED_UNDER_ZERO_3, result, run_case_here
from family_stages import KIT, STAGES, artifact_kind

sys.path.pop(0)


def test_the_kit_knows_every_family() -> None:
    assert set(STAGES) == {*BUILT, "vision_language"}


@pytest.mark.parametrize("family", KIT)
def test_a_stage_runs_to_a_verified_candidate(finished: Path, family: str) -> None:
    found = result(finished, "straight", family)
    assert found["outcome"] == {"state": "completed", "rule": None, "steps_done": 6, "steps_planned": 6}
    assert found["kind"] == artifact_kind(family)
    assert found["difference"] < LIMIT
    assert list(found["curves"]["eval/loss"]) == ["4", "6"]
    assert found["metrics"]["evaluation"]["loss"] == found["curves"]["eval/loss"]["6"]


def compare(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Hold what a stage that was stopped after three steps made against what it makes straight."""
    assert resumed["steps"] == [4, 5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]
    assert [line["image"] for line in resumed["grids"]][-1:] == [line["image"] for line in straight["grids"]][-1:]


@pytest.mark.parametrize("family", [family for family in KIT if family in RESUMED])
def test_a_preempted_stage_ends_in_the_same_bytes(finished: Path, family: str) -> None:
    compare(result(finished, "straight", family), result(finished, "stopped", family))


@pytest.mark.long
@pytest.mark.parametrize("family", [family for family in KIT if family not in RESUMED])
def test_every_preempted_stage_ends_in_the_same_bytes(every_stage: Path, family: str) -> None:
    compare(result(every_stage, "straight", family), result(every_stage, "stopped", family))


@pytest.mark.parametrize("family", RESUMED_UNDER_ZERO_3)
def test_a_preempted_stage_under_zero_3_ends_in_the_same_bytes(finished: Path, family: str) -> None:
    straight, resumed = result(finished, "zero3", family), result(finished, "stopped-zero3", family)
    compare(straight, resumed)
    assert list(resumed["curves"]["eval/loss"]) == ["4", "6"]


def test_pseudo_labels_teach_after_their_warm_up_and_after_a_resume(finished: Path) -> None:
    straight, resumed = (result(finished, run, "classified-few") for run in ("straight", "stopped"))
    assert set(straight["curves"]["pseudo_share"]) == {"2", "3", "4", "5", "6"}
    assert min(straight["curves"]["pseudo_share"].values()) > 0
    assert resumed["curves"]["pseudo_share"] == {
        step: share for step, share in straight["curves"]["pseudo_share"].items() if int(step) > 3
    }
    rows = straight["metrics"]["rows"]
    assert 0 < rows["labelled"] < rows["unlabelled"]
    assert result(finished, "straight", "classified")["curves"]["pseudo_share"] == {}


def test_an_evaluation_of_a_recurrent_model_agrees_with_its_stage(finished: Path) -> None:
    source = STAGES["rnn"]["data"]
    evaluation = {
        "kind": "evaluate",
        "of": ["rnn"],
        "suites": ["perplexity"],
        "text": source,
        "sequence_length": 24,
        "num_sequences": 10_000,
    }
    run_case_here(finished, Case("here", "eval", evaluation, {"of.0": "rnn"}))
    found = result(finished, "here", "eval")["metrics"]
    own = result(finished, "straight", "rnn")["metrics"]["evaluation"]
    for name in ("perplexity", "ngram_perplexity"):
        assert found[f"rnn.{name}"] == pytest.approx(own[name], rel=1e-5)
