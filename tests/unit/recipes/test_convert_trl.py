"""TRL's configurations, converted, with accelerate's."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import SYSTEMS
from recipes.convert.rules import Outcome
from recipes.convert.source_text import read_source
from recipes.errors import RequestError
from recipes.loading.load import check_file
from recipes.problem_codes import Code
from tests.unit.recipes.conversions import Convert, refused_of, stage_of

TRL = """\
model_name_or_path: acme/tiny
dataset_name: rows.jsonl
use_peft: true
learning_rate: 2e-4
num_train_epochs: 1
per_device_train_batch_size: 4
packing: true
assistant_only_loss: true
report_to: none
"""
ACCELERATE = {
    "distributed_type": "DEEPSPEED",
    "mixed_precision": "bf16",
    "num_processes": 4,
    "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 3, "offload_optimizer_device": "none"},
}


def with_accelerate(tmp_path: Path, system: str = "trl", text: str = TRL, **options: Any) -> Conversion:
    (tmp_path / "trl.yaml").write_text(text)
    (tmp_path / "accelerate.json").write_text(json.dumps(ACCELERATE))
    sources = [read_source(tmp_path / name, tmp_path) for name in ("accelerate.json", "trl.yaml")]
    return convert([(sources[0], SYSTEMS["accelerate"]), (sources[1], SYSTEMS[system])], tmp_path, **options)


def test_trl_with_a_configuration_of_accelerate(tmp_path: Path) -> None:
    found = with_accelerate(tmp_path)
    assert refused_of(found) == {}
    stage = stage_of(found)
    assert found.recipe["cluster"] == {"workers": 4}
    assert stage["train"]["global_batch"] == 4 * 3 * 4
    assert stage["data"] == {"source": "jsonl", "files": ["./rows.jsonl"]}
    assert stage["lora"] == {"r": 16, "alpha": 32, "dropout": 0.05}
    assert (stage["loss_on"], stage["train"]["packing"], stage["train"]["schedule"]) == (
        "responses", True, {"name": "linear"},
    )  # fmt: skip
    assert stage["shard"] == {"zero": 2, "precision": "bf16", "gradient_checkpointing": True, "micro_batch": 4}


def test_the_command_line_decides_about_gpus(tmp_path: Path) -> None:
    found = with_accelerate(tmp_path, workers=2)
    assert (refused_of(found), found.recipe["cluster"]) == ({}, {"workers": 2})


def test_what_trl_learns_by_default_is_said(tmp_path: Path) -> None:
    found = with_accelerate(tmp_path, text=TRL.replace("assistant_only_loss: true\n", ""))
    (line,) = (line for line in found.draft.of(Outcome.CHANGED) if line.key == "assistant_only_loss")
    assert "TRL learns every token" in line.reason


def test_a_problem_names_the_file_that_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "acc.yaml").write_text("distributed_type: NO\nmixed_precision: int4\n")
    (tmp_path / "trl.yaml").write_text(TRL)
    sources = [read_source(tmp_path / name, tmp_path) for name in ("trl.yaml", "acc.yaml")]
    found = convert([(sources[0], SYSTEMS["trl"]), (sources[1], SYSTEMS["accelerate"])], tmp_path)
    (problem,) = map(found.draft.describe, found.refused)
    assert (problem.file, problem.line, problem.field) == (str(tmp_path / "acc.yaml"), 2, "mixed_precision")


def test_two_whole_configurations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(TRL)
    source = read_source(tmp_path / "trl.yaml", tmp_path)
    with pytest.raises(RequestError, match=r"trl.yaml and .*trl.yaml"):
        convert([(source, SYSTEMS["trl"]), (source, SYSTEMS["axolotl"])], tmp_path)


@pytest.mark.parametrize(("command", "rate"), [("sft", 2e-5), ("reward", 1e-4), ("dpo", 1e-6), ("kto", 1e-6)])
def test_each_command_of_trl_has_its_learning_rate(converted: Convert, command: str, rate: float) -> None:
    text = TRL.replace("learning_rate: 2e-4\n", "").replace("assistant_only_loss: true\n", "")
    stage = stage_of(converted(f"command: {command}\n{text}"))
    assert stage["train"]["optimizer"]["lr"] == rate


def test_preferences_of_trl(tmp_path: Path) -> None:
    text = TRL.replace("assistant_only_loss: true\n", "") + "loss_type: [ipo]\nbeta: 0.3\n"
    stage = stage_of(with_accelerate(tmp_path, text=text))
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "ipo", "beta": 0.3})
    judged = stage_of(with_accelerate(tmp_path, text=text.replace("[ipo]", "kto") + "desirable_weight: 2\n"))
    assert (judged["kind"], judged["loss"]) == ("preference", {"name": "kto", "beta": 0.3, "desirable_weight": 2.0})
    several = with_accelerate(tmp_path, text=text.replace("[ipo]", "[ipo, sigmoid]"))
    assert refused_of(several).keys() == {"loss_type"}


GRPO = """\
command: grpo
model_name_or_path: acme/tiny
dataset_name: rows.jsonl
reward_funcs: [accuracy_reward, think_format_reward, scores.short]
reward_weights: [1.0, 0.5, 0.25]
num_generations: 8
max_completion_length: 512
max_prompt_length: 256
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
steps_per_generation: 4
num_iterations: 2
max_steps: 200
beta: 0.04
epsilon_high: 0.28
loss_type: dr_grpo
scale_rewards: none
lr_scheduler_type: cosine
max_grad_norm: 0.2
use_peft: true
lora_r: 4
"""


def grpo_stage(folder: Path, text: str = GRPO, **options: Any) -> tuple[dict[str, Any], dict[str, str]]:
    (folder / "trl.yaml").write_text(text)
    found = convert([(read_source(folder / "trl.yaml", folder), SYSTEMS["trl"])], folder, **options)
    (folder / "recipe.yaml").write_text(json.dumps(found.recipe))
    return stage_of(found), refused_of(found)


def test_grpo_of_trl(tmp_path: Path) -> None:
    stage, refused = grpo_stage(tmp_path, workers=2)
    assert refused == {}
    assert (stage["kind"], stage["actor"], stage["prompts"]["files"]) == ("rl", "hf://acme/tiny@main", ["./rows.jsonl"])
    assert stage["rewards"]["accuracy_reward"] == {"rule": "math_verify", "column": "solution", "weight": 1.0}
    assert stage["rewards"]["think_format_reward"]["weight"] == 0.5
    assert stage["rewards"]["short"] == {"python": "scores:short", "weight": 0.25}
    drawn, step = 8 * 4 * 2, 8 * 2 * 2
    assert stage["rollout"] == {
        "samples_per_prompt": 8, "max_new_tokens": 512, "max_prompt_tokens": 256, "prompts_per_iteration": drawn // 8,
    }  # fmt: skip
    algorithm = stage["algorithm"]
    assert algorithm["mini_batches"] == drawn // step
    assert algorithm["iterations"] == 200 // (algorithm["mini_batches"] * algorithm["epochs"])
    assert (algorithm["name"], algorithm["aggregation"], algorithm["scale"]) == ("grpo", "constant", "none")
    assert (algorithm["kl_coef"], algorithm["kl_in"], algorithm["kl_estimator"]) == (0.04, "loss", "k3")
    assert (algorithm["clip_low"], algorithm["clip_high"]) == (0.2, 0.28)
    assert (algorithm["optimizer"]["lr"], algorithm["gradient_clipping"]) == (1e-6, 0.2)
    problems = check_file(tmp_path / "recipe.yaml")[1]
    assert {problem.code for problem in problems} <= {Code.MISSING_FOLDER, Code.MISSING_FILE}, problems


def test_grpo_is_known_by_its_keys_and_counts_epochs_in_rows(tmp_path: Path) -> None:
    text = "model_name_or_path: acme/tiny\ndataset_name: rows.jsonl\nreward_funcs: think_format_reward\n"
    stage, refused = grpo_stage(tmp_path, text + "num_train_epochs: 2\nloss_type: cispo\nepsilon_high: 5\n", rows=100)
    assert refused == {}
    assert stage["algorithm"]["iterations"] == 2 * 100 // stage["rollout"]["prompts_per_iteration"]
    assert (stage["algorithm"]["name"], stage["algorithm"]["max_ratio"]) == ("cispo", 5.0)
    assert "clip_high" not in stage["algorithm"]
    assert check_file(tmp_path / "recipe.yaml")[1] == []
    assert grpo_stage(tmp_path, text)[1].keys() == {"iterations"}
    assert grpo_stage(tmp_path, text + "loss_type: cispo\n", rows=100)[1].keys() == {"epsilon_high"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward_funcs", "[reasoning_accuracy_reward]"),
        ("reward_funcs", "[unknown]"),
        ("reward_weights", "[1.0]"),
        ("num_generations", "6"),
        ("top_p", "0.9"),
        ("loss_type", "sapo"),
    ],
)
def test_what_grpo_here_cannot_say_is_refused_by_its_key(tmp_path: Path, key: str, value: str) -> None:
    kept = "".join(f"{line}\n" for line in GRPO.splitlines() if not line.startswith(f"{key}:"))
    _, refused = grpo_stage(tmp_path, f"{kept}{key}: {value}\n")
    assert any(name.startswith(key) for name in refused), refused
