"""Plans for GPUs that are not there, from a `config.json` alone: what fits, what does not, and what would."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.planning.gpus import GPUS

RECIPE = """
name: big
cluster: {price_per_gpu_hour: 2.5}
stages:
  tuned:
    kind: finetune
    init_from: ./model
    data: {source: python-docs}
    train: {steps: 100, global_batch: 64, sequence_length: 4096, optimizer: {lr: 1e-5}}
"""
BUILT = """
name: built
stages:
  base:
    kind: pretrain
    architecture:
      {family: decoder, type: llama, num_hidden_layers: 24, hidden_size: 2048, intermediate_size: 5504,
       num_attention_heads: 16}
    tokenizer: {train: bpe, vocab_size: 32000}
    data: {source: python-docs}
    train: {steps: 100, global_batch: 64, sequence_length: 1024, optimizer: {lr: 1e-5}}
"""
LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32000,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
MODULES = 850
"""That a plan may load; each is found, read and run before anything is answered."""


@pytest.fixture
def plan(call: Any, tmp_path: Path) -> Any:
    """Plan the recipe for a model: exit code, the plan's JSON, what was said of it."""
    (tmp_path / "big.yaml").write_text(RECIPE)

    def planned(config: dict[str, Any], *arguments: str) -> tuple[int, Any, str]:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        code, out, err = call("plan", str(tmp_path / "big.yaml"), "--json", *arguments)
        return code, json.loads(out) if out else None, err

    return planned


def test_a_smaller_micro_batch_is_taken_where_the_largest_does_not_fit(plan: Any) -> None:
    code, found, _ = plan(LLAMA_7B, "--on", "8xH100")
    (tuned,) = found["stages"]
    assert (code, found["misfits"]) == (0, [])
    assert (tuned["micro_batch"], tuned["accumulation"], tuned["engine"]) == (1, 8, "zero 3")
    assert re.fullmatch(
        r"micro-batch 1: .* of 64.0 GiB in each worker; 8 would take .*", tuned["settled_by"]["micro_batch"]
    )
    assert tuned["sizes"]["memory_per_worker_bytes"] == sum(tuned["sizes"]["memory"].values())
    assert tuned["cost"]["price"] == pytest.approx(8 * 2.5 * tuned["cost"]["seconds"] / 3600)
    assert "./model " in tuned["notes"][0]


@pytest.mark.parametrize(
    ("config", "on", "settings"),
    [
        (LLAMA_7B, "8xH100", ["stages.tuned.shard.micro_batch=8"]),
        (LLAMA_7B, "8xH100", ["stages.tuned.shard={precision: fp32, zero: 1, micro_batch: 1}"]),
        (LLAMA_7B, "4xA100-40", []),
        (LLAMA_7B, "1xH100", []),
        (LLAMA_70B, "8xH100", []),
        (LLAMA_70B, "8xH100", ["stages.tuned.lora={r: 16}"]),
    ],
)
def test_the_change_that_is_named_makes_it_fit(plan: Any, config: dict[str, Any], on: str, settings: list[str]) -> None:
    before = [word for setting in settings for word in ("--set", setting)]
    code, found, _ = plan(config, "--on", on, *before)
    (misfit,) = found["misfits"]
    assert code == 3
    named = re.search(
        r"it fits(?: (?:(?P<more>\d+) GPUs|(?P<other>\d+x\S+)))?(?: with (?P<changes>--set .*))?$", misfit
    )
    assert named is not None, misfit
    gpu = on.partition("x")[2]
    there = named["other"] or (f"{named['more']}x{gpu}" if named["more"] else on)
    code, found, err = plan(config, "--on", there, *before, *shlex.split(named["changes"] or ""))
    assert (code, found["misfits"]) == (0, []), err
    (tuned,) = found["stages"]
    memory = GPUS[there.partition("x")[2]].memory_bytes
    assert tuned["sizes"]["memory_per_worker_bytes"] < memory


def test_what_fits_no_gpu_says_so(plan: Any) -> None:
    _, found, _ = plan({**LLAMA_70B, "num_hidden_layers": 4000}, "--on", "8xH100")
    assert "that was tried makes it fit" in found["misfits"][0]


def test_a_hub_model_that_cannot_be_reached_is_planned_without_figures(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    code, found, _ = plan(LLAMA_7B, "--on", "8xH100", "--set", f"stages.tuned.init_from=hf://nobody/nothing@{revision}")
    (tuned,) = found["stages"]
    assert (code, tuned["sizes"], tuned["cost"]) == (0, None, None)
    assert f" hf://nobody/nothing@{revision} " in tuned["unknown"]
    assert "hub's cache" in tuned["notes"][0]


def test_the_table_names_parts_price_and_rates(call: Any, plan: Any, tmp_path: Path) -> None:
    plan(LLAMA_7B, "--on", "8xH100")
    code, out, _ = call("plan", str(tmp_path / "big.yaml"), "--on", "8xH100", "--utilisation", "0.5")
    assert code == 0
    for text in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "price",
        "6.74 G",
        "12.6 GiB",
        "75.3 GiB",
        "50% of H100's peak",
    ):
        assert text in out


def test_unknown_gpus_and_check(call: Any, plan: Any, tmp_path: Path) -> None:
    code, _, err = plan(LLAMA_7B, "--on", "8xH1000")
    assert (code, err.strip()) == (2, "--on 8xH1000: no GPU of this name is known; did you mean H100?")
    (tmp_path / "big.yaml").write_text(BUILT)
    code, out, err = call("check", str(tmp_path / "big.yaml"), "--on", "4xH100")
    assert (code, "it fits: 1 of 1 stages to compute on 4 GPU workers" in out) == (0, True), err
    code, _, err = call("check", str(tmp_path / "big.yaml"), "--on", "2xT4")
    assert (code, "it fits 4 GPUs with --set stages.base.shard." in err) == (3, True), err


def test_a_plan_of_70b_loads_no_torch(plan: Any, tmp_path: Path) -> None:
    plan(LLAMA_70B, "--on", "8xH100")
    command = [sys.executable, "-X", "importtime", "-m", "launch.cli"]
    done = subprocess.run(
        [*command, "plan", str(tmp_path / "big.yaml"), "--on", "8xH100", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 3, done.stderr
    assert "recipes.recipe" in loaded
    assert not {"torch", "transformers", "ray"} & loaded
    assert len(loaded) < MODULES
