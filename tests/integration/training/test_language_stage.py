"""Pretraining and LoRA fine-tuning on two workers, as whole stages: drafts, verification, preemption and resume."""

import json
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("language_worker.py")


@pytest.fixture(scope="module")
def finished(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both stages ran straight and again with a preemption."""
    folder = tmp_path_factory.mktemp("language")
    lines = [f"The number {n} comes before {n + 1}.\nAnd {n} is {'even' if n % 2 == 0 else 'odd'}." for n in range(120)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    pairs = [{"prompt": f"What comes after {n}?", "completion": f"After {n} comes {n + 1}."} for n in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    run_ranks(WORKER, [folder], folder, 2, TRAINWRIGHT_CACHE=str(folder / "cache"))
    return folder


def result(folder: Path, name: str) -> dict[str, Any]:
    """Read what rank 0 reported."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_pretraining_commits_a_verified_model_that_learned(finished: Path) -> None:
    found = result(finished, "straight-base")
    assert found["kind"] == "model"
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= set(found["files"])
    assert found["difference"] < 1e-5
    assert found["outcome"] == {"state": "completed", "rule": None, "steps_done": 6, "steps_planned": 6}
    assert found["metrics"]["train"]["loss"] < 5.5
    assert 0 < found["metrics"]["evaluation"]["loss"] < 5.6
    assert found["gate_reasons"] == []


def test_fine_tuning_commits_adapter_and_merged_model(finished: Path) -> None:
    found = result(finished, "straight-chat")
    assert found["kind"] == "adapter"
    assert {name.split("/")[0] for name in found["files"]} == {"adapter", "model"}
    assert len(found["checks"]) == 2
    assert found["difference"] < 2e-2
    assert found["base"] == result(finished, "straight-base")["digest"]
    assert found["metrics"]["data"]["supervised_tokens"] > 0
    assert found["metrics"]["responses"]["prompts"] > 0
    assert 0 <= found["metrics"]["responses"]["eos_rate"] <= 1


@pytest.mark.parametrize("stage", ["base", "chat"])
def test_a_preempted_stage_ends_in_the_same_bytes(finished: Path, stage: str) -> None:
    straight, resumed = result(finished, f"straight-{stage}"), result(finished, f"stopped-{stage}")
    assert straight["steps"] == [1, 2, 3, 4, 5, 6]
    assert resumed["steps"] == [4, 5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]
