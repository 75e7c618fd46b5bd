"""Pretraining and LoRA fine-tuning on two workers, as whole stages: candidates, verification, preemption and resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.ranks import run_ranks
from tests.stages import Case, run_cases
from trainers.store.store import Store

TRAIN: dict[str, Any] = {
    "steps": 6,
    "global_batch": 8,
    "sequence_length": 32,
    "optimizer": {"lr": 1e-2},
    "save_every": 100,
    "evaluate_every": 4,
    "evaluation_rows": 8,
}
STAGES: dict[str, dict[str, Any]] = {
    "base": {
        "kind": "pretrain",
        "architecture": {
            "family": "decoder",
            "type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "tokenizer": {"train": "bpe", "vocab_size": 320},
        "data": {"source": "text", "files": ["text.txt"], "documents": "paragraph", "hold_out": 0.2},
        "train": TRAIN,
        "shard": {"zero": 2},
    },
    "chat": {
        "kind": "finetune",
        "init_from": "base",
        "lora": {"r": 4},
        "data": {"source": "jsonl", "files": ["chat.jsonl"], "hold_out": 0.2},
        "train": {**TRAIN, "sequence_length": 64},
        "shard": {"zero": 3, "precision": "bf16"},
    },
}
MORE = {**STAGES["chat"], "init_from": "chat", "lora": None, "shard": {"engine": "plain", "precision": "fp32"}}
"""Continues from a model made in another precision, by another engine."""


def _cases() -> list[Case]:
    """Both stages straight, then each with a stop on the way."""
    cases = []
    for stage, spec in STAGES.items():
        inputs = {"init_from": "base"} if stage == "chat" else {}
        cases.append(Case("straight", stage, spec, inputs, is_kept=True))
        cases += [Case("stopped", stage, spec, inputs, stop_at=2), Case("stopped", stage, spec, inputs)]
    return [*cases, Case("straight", "more", MORE, {"init_from": "chat"}, is_kept=True)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both stages ran straight and again with a preemption."""
    folder = tmp_path_factory.mktemp("language")
    lines = [f"The number {n} comes before {n + 1}.\nAnd {n} is {'even' if n % 2 == 0 else 'odd'}." for n in range(120)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    pairs = [{"prompt": f"What comes after {n}?", "completion": f"After {n} comes {n + 1}."} for n in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    run_ranks(folder, 2, run_cases, folder, _cases())
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


def test_a_chain_mixes_precisions(finished: Path) -> None:
    store = Store.open(str(finished / "store"))
    for name, dtype in (("base", "float32"), ("chat", "bfloat16"), ("more", "float32")):
        folder = store.folder(store.resolve(name), "model")
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    found = result(finished, "straight-more")
    assert found["difference"] < 1e-5
    assert found["metrics"]["train"]["loss"] < result(finished, "straight-chat")["metrics"]["train"]["loss"]
