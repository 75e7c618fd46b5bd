"""Command lines of OpenRLHF and verl, and verl's YAML, converted."""

from pathlib import Path
from typing import Any

import pytest

from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import recognise
from recipes.convert.rules import Outcome
from recipes.convert.source_text import read_source
from recipes.errors import RecipeError
from recipes.problem_codes import Code

OPENRLHF = """\
#!/bin/bash
# trains with --train.batch_size 1
set -x
MODEL=acme/tiny
read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft \\
   --data.dataset ${DATA:-rows.jsonl} \\
   --data.input_key question \\
   --data.output_key answer \\
   --train.batch_size 64 \\
   --train.micro_batch_size=2 \\
   --model.model_name_or_path $MODEL \\
   --ckpt.save_steps -1 \\
   --adam.betas 0.9 0.98 \\
   --ds.lora.rank 8 \\
   --ds.packing_samples
EOF
deepspeed --module $training_commands
"""
VERL = """\
torchrun -m verl.trainer.fsdp_sft_trainer \\
    data.train_files=rows.parquet \\
    data.prompt_key=extra \\
    "data.prompt_dict_keys=['question']" \\
    data.response_key=answer \\
    model.partial_pretrain=acme/tiny \\
    +model.lora_rank=4 \\
    trainer.n_gpus_per_node=4 trainer.nnodes=2 \\
    trainer.total_training_steps=200 $@
"""


def _convert(tmp_path: Path, text: str, name: str = "train.sh") -> Conversion:
    (tmp_path / name).write_text(text)
    source = read_source(tmp_path / name, tmp_path)
    return convert([(source, recognise(source.value, name)[0])], tmp_path)


def _stage(conversion: Conversion) -> Any:
    assert {line.key: line.reason for line in conversion.refused} == {}
    (stage,) = conversion.recipe["stages"].values()
    return stage


def test_a_script_of_openrlhf(tmp_path: Path) -> None:
    found = _convert(tmp_path, OPENRLHF)
    stage = _stage(found)
    assert stage["data"] == {
        "source": "jsonl",
        "files": ["./rows.jsonl"],
        "columns": {"prompt": "User: {question}\nAssistant: ", "completion": "answer"},
    }
    assert stage["template"] == "none"
    assert (stage["train"]["global_batch"], stage["shard"]["micro_batch"]) == (64, 2)
    assert stage["train"]["optimizer"] == {"lr": 5e-6, "betas": [0.9, 0.98]}
    assert stage["train"]["schedule"] == {"name": "cosine", "warmup_ratio": 0.03, "min_ratio": 0.1}
    assert (stage["init_from"], stage["lora"], stage["train"]["epochs"]) == ("hf://acme/tiny@main", {"r": 8}, 2)


def test_openrlhf_with_the_old_arguments(tmp_path: Path) -> None:
    found = _convert(
        tmp_path,
        "python -m openrlhf.cli.train_dpo --pretrain acme/tiny --dataset pairs.jsonl --train_batch_size 8 "
        "--micro_train_batch_size 1 --learning_rate 5e-7 --beta 0.2 --ipo --bf16 --apply_chat_template --max_len 256",
    )
    stage = _stage(found)
    assert (stage["kind"], stage["loss"], stage["template"]) == ("preference", {"name": "ipo", "beta": 0.2}, "chat")
    assert stage["train"] == {
        "epochs": 1, "global_batch": 8, "sequence_length": 256, "optimizer": {"lr": 5e-7, "betas": [0.9, 0.95]},
        "schedule": {"name": "cosine", "warmup_ratio": 0.03, "min_ratio": 0.1},
    }  # fmt: skip


def test_overrides_of_verl(tmp_path: Path) -> None:
    found = _convert(tmp_path, VERL)
    stage = _stage(found)
    assert stage["data"] == {
        "source": "parquet",
        "files": ["./rows.parquet"],
        "columns": {"prompt": "extra.question", "completion": "answer"},
    }
    assert (found.recipe["cluster"], stage["lora"]) == ({"workers": 8}, {"r": 4})
    assert (stage["train"]["steps"], stage["train"]["schedule"]["warmup_steps"]) == (200, 20)


def test_yaml_of_verl_is_read_by_its_paths(tmp_path: Path) -> None:
    text = """\
data:
  train_files: [a.parquet, b.parquet]
  multiturn: {enable: true, messages_key: turns}
  truncation: middle
model: {partial_pretrain: acme/tiny}
trainer: {total_epochs: 2, logger: [console]}
"""
    found = _convert(tmp_path, text, "verl.yaml")
    (problem,) = map(found.draft.describe, found.refused)
    assert (problem.field, problem.line) == ("data.truncation", 4)
    stage = _stage(_convert(tmp_path, text.replace("middle", "right"), "verl.yaml"))
    assert stage["data"]["files"] == ["./a.parquet", "./b.parquet"]
    assert stage["data"]["columns"] == {"messages": "turns"}
    assert "trainer.logger" in {line.key for line in found.draft.of(Outcome.NO_EFFECT)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\necho nothing\n", "no command of OpenRLHF, verl or TRL"),
        (f"{OPENRLHF}python -m openrlhf.cli.train_rm --adam.lr 1\n", "2 training commands; one is converted at a time"),
    ],
)
def test_scripts_without_one_command(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        _convert(tmp_path, text)
    assert caught.value.problems[0].code == Code.INVALID_FORMAT


@pytest.mark.parametrize(
    ("argument", "key", "reason"),
    [
        ("--train.bath_size 3", "train.bath_size", "did you mean train.batch_size?"),
        ("--data.max_len $LENGTH", "data.max_len", "holds a variable that the file does not set"),
        ("--optim muon", "optim", "another optimiser than AdamW"),
        ("--data.max_samples many", "data.max_samples", "must be a number"),
    ],
)
def test_arguments_that_are_refused(tmp_path: Path, argument: str, key: str, reason: str) -> None:
    found = _convert(
        tmp_path, OPENRLHF.replace("   --ds.packing_samples\n", f"   --ds.packing_samples \\\n   {argument}\n")
    )
    (problem,) = map(found.draft.describe, found.refused)
    assert (problem.field, problem.line) == (key, 17)
    assert reason in problem.message


def test_arguments_alone(tmp_path: Path) -> None:
    text = "--model.model_name_or_path acme/tiny --data.dataset a.jsonl --data.output_key b --train.batch_size 4"
    stage = _stage(_convert(tmp_path, text, "arguments.txt"))
    assert (stage["kind"], stage["train"]["global_batch"]) == ("finetune", 4)


def test_a_command_of_trl(tmp_path: Path) -> None:
    text = "trl dpo --model_name_or_path acme/tiny --dataset_name acme/pairs --beta 0.3 --use_peft && echo done"
    stage = _stage(_convert(tmp_path, f"accelerate launch -m x\n{text}\n"))
    assert (stage["kind"], stage["loss"], stage["lora"]["r"]) == ("preference", {"beta": 0.3}, 16)
