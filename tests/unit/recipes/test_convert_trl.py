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
