"""The families' small diffusions, of classes and of captions, tuned to a reward by the small classifier."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.store.export import export
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import LIMIT, result
from family_stages import TUNED

sys.path.pop(0)


def compare(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Hold what a stage that was stopped made against what it makes straight."""
    assert resumed["steps"] == [5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]


def test_a_tuned_diffusion_ends_in_the_same_bytes_after_a_preemption(finished: Path) -> None:
    compare(result(finished, "straight", "tuned"), result(finished, "stopped", "tuned"))


@pytest.mark.long
def test_adapters_tuned_on_captions_end_in_the_same_bytes_after_a_preemption(every_stage: Path) -> None:
    compare(result(every_stage, "straight", "tuned-captions"), result(every_stage, "stopped", "tuned-captions"))


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_diffusion_is_verified_and_drawn_in_every_iteration(finished: Path, name: str) -> None:
    straight = result(finished, "straight", name)
    assert straight["outcome"] == {"state": "completed", "rule": None, "steps_done": 6, "steps_planned": 6}
    assert straight["kind"] == "ddpm"
    assert straight["difference"] < LIMIT
    assert straight["metrics"]["end"]["score_mean"] == straight["curves"]["score_mean"]["6"]
    assert [line["step"] for line in straight["grids"]] == [0, 2, 4, 6]
    assert straight["grids"][0]["image"] != straight["grids"][-1]["image"]


@pytest.mark.parametrize("name", TUNED)
def test_the_first_iteration_of_a_tuned_diffusion_is_the_same_on_two_workers(finished: Path, name: str) -> None:
    compare_first(result(finished, "plain", name), result(finished, "straight", name))


@pytest.mark.long
def test_the_first_iteration_of_a_tuned_diffusion_is_the_same_under_zero_3(every_stage: Path) -> None:
    compare_first(result(every_stage, "plain", "tuned"), result(every_stage, "zero3", "tuned"))


def compare_first(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Hold the first iterations of two runs against each other."""
    assert found["curves"]["score_mean"]["0"] == pytest.approx(wanted["curves"]["score_mean"]["0"], rel=1e-5)
    for step in ("1", "2"):
        assert found["curves"]["loss"][step] == pytest.approx(wanted["curves"]["loss"][step], rel=2e-4, abs=2e-5)
    assert wanted["curves"]["kl"]["2"] > 0


def test_a_tuned_diffusion_draws_by_the_sampler_that_it_was_tuned_with(finished: Path, tmp_path: Path) -> None:
    from trainers.models.images.build import open_family

    store = Store.open(str(finished / "store"))
    opened: Any = open_family(export(store, store.resolve("tuned"), tmp_path / "model"))
    assert (opened.settings.sampler, opened.settings.sampling_steps, opened.settings.guidance) == ("ddpm", 5, 1.5)
    assert opened.sample([1, 2], [1, 8]).shape == (2, 1, 8, 8)


def test_a_captioned_diffusion_is_tuned_by_an_adapter_that_is_bound_to_it(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from trainers.models.images.build import open_family

    store = Store.open(str(finished / "store"))
    start, tuned = store.resolve("captioned"), store.resolve("tuned-captions")
    assert tuned.base == start.digest
    assert [check["adapter"] for check in result(finished, "straight", "tuned-captions")["checks"]] == [None, "adapter"]
    assert "adapter/adapter_model.safetensors" in tuned.files
    unet = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(store.folder(manifest, "model") / unet) for manifest in (start, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".to_" in name for name in moved)
    assert tuned.files["model/text_encoder/model.safetensors"] == start.files["model/text_encoder/model.safetensors"]
    opened: Any = open_family(store.folder(tuned, "model"))
    assert (opened.settings.sampler, opened.settings.guidance, opened.is_captioned) == ("ddpm", 1.5, True)
    assert opened.sample([1, 2], captions=["a seven", "a thin three"]).shape == (2, 1, 8, 8)
    exported = export(store, tuned, tmp_path / "adapter")
    assert json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        exported / "base"
    )
