"""The families' small diffusion, tuned to a reward by the small classifier."""

import sys
from pathlib import Path
from typing import Any

import pytest

from trainers.store.export import export
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import LIMIT, result

sys.path.pop(0)


def test_a_tuned_diffusion_ends_in_the_same_bytes_after_a_preemption(finished: Path) -> None:
    straight, resumed = result(finished, "straight", "tuned"), result(finished, "stopped", "tuned")
    assert straight["outcome"] == {"state": "completed", "rule": None, "steps_done": 6, "steps_planned": 6}
    assert straight["kind"] == "ddpm"
    assert straight["difference"] < LIMIT
    assert resumed["steps"] == [5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]
    assert straight["metrics"]["end"]["score_mean"] == straight["curves"]["score_mean"]["6"]
    assert [line["step"] for line in straight["grids"]] == [0, 2, 4, 6]
    assert straight["grids"][0]["image"] != straight["grids"][-1]["image"]


@pytest.mark.parametrize("run", ["zero3", "plain"])
def test_the_first_iteration_of_a_tuned_diffusion_is_the_same_everywhere(finished: Path, run: str) -> None:
    wanted, found = result(finished, "straight", "tuned"), result(finished, run, "tuned")
    assert found["curves"]["score_mean"]["0"] == pytest.approx(wanted["curves"]["score_mean"]["0"], rel=1e-5)
    for step in ("1", "2"):
        assert found["curves"]["loss"][step] == pytest.approx(wanted["curves"]["loss"][step], rel=2e-4, abs=2e-5)
    assert wanted["curves"]["kl"]["2"] > 0


def test_a_tuned_diffusion_draws_by_the_sampler_that_it_was_tuned_with(finished: Path, tmp_path: Path) -> None:
    from trainers.families.build import open_family

    store = Store.open(str(finished / "store"))
    opened: Any = open_family(export(store, store.resolve("tuned"), tmp_path / "model"))
    assert (opened.settings.sampler, opened.settings.sampling_steps, opened.settings.guidance) == ("ddpm", 5, 1.5)
    assert opened.sample([1, 2], [1, 8]).shape == (2, 1, 8, 8)
