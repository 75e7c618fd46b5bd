"""The commands of docs/coming-from.md run, on files that a user of each system might have."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "coming-from.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^trainwright (convert .+)$", PAGE, re.MULTILINE)
AXOLOTL = """\
base_model: acme/tiny-llama
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
datasets:
  - {path: acme/chats, type: chat_template}
chat_template: tokenizer_default
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_torch
learning_rate: 2e-4
bf16: auto
"""
FILES = {
    "axolotl.yaml": AXOLOTL,
    "axolotl_more.yaml": f"{AXOLOTL}loraplus_lr_ratio: 16\n",
    "llama_factory.yaml": "model_name_or_path: acme/tiny\nstage: sft\ndo_train: true\ndataset: mine\ntemplate: qwen\n",
    "data/dataset_info.json": json.dumps({"mine": {"file_name": "mine.jsonl"}}),
    "data/mine.jsonl": json.dumps({"instruction": "add", "input": "1 1", "output": "2"}),
    "trl.yaml": "model_name_or_path: acme/tiny\ndataset_name: acme/rows\nassistant_only_loss: true\n",
    "accelerate.yaml": "distributed_type: DEEPSPEED\nnum_processes: 4\ndeepspeed_config: {zero_stage: 2}\n",
    "train_openrlhf.sh": "python -m openrlhf.cli.train_rm --model.model_name_or_path acme/tiny "
    "--data.dataset acme/pairs\n",
    "train_verl.sh": "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo "
    "actor_rollout_ref.model.path=acme/tiny data.train_files=prompts.parquet actor_rollout_ref.rollout.n=4\n",
    "ds_config.json": json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(call: Any, command: str) -> None:
    code, out, err = call(*shlex.split(command))
    assert code == 0, err
    assert "still needed: " in err
    assert ("-o" in command) == (out == "")


def test_the_page_has_commands_of_every_file() -> None:
    assert len(COMMANDS) >= 7
    assert all(any(name in command for command in COMMANDS) for name in FILES if "/" not in name)


def test_the_recipe_of_the_page_is_what_comes_out(call: Any, folder: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    code, _, _ = call("convert", "axolotl.yaml", "-o", "my.yaml")
    written = (folder / "my.yaml").read_text().partition("\n")[2]
    assert (code, written.partition("\n\n#")[0]) == (0, shown.rstrip("\n"))
