"""Configurations of other systems as people write them, and what tests read from a conversion."""

from collections.abc import Callable
from typing import Any

from recipes.convert.engine import Conversion

Convert = Callable[..., Conversion]

AXOLOTL = """\
base_model: acme/tiny-llama
revision_of_model: 0123abc
load_in_4bit: true
adapter: qlora
lora_r: 64
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: acme/chats
    type: chat_template
    field_messages: turns
    split: train[:5%]
chat_template: chatml
val_set_size: 0.02
sequence_len: 1024
sample_packing: true
micro_batch_size: 4
gradient_accumulation_steps: 3
num_epochs: 2
optimizer: paged_adamw_8bit
learning_rate: 1e-4
lr_scheduler: cosine
warmup_ratio: 0.1
bf16: auto
gradient_checkpointing: true
wandb_project: mine
seed: 7
"""

LLAMA_FACTORY = """\
model_name_or_path: acme/tiny-qwen
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: bills, notes
template: qwen
cutoff_len: 512
max_samples: 200
output_dir: out
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2.0e-4
max_steps: 100
lr_scheduler_type: cosine
warmup_ratio: 0.25
val_size: 0.1
"""
DATASET_INFO = {
    "bills": {"file_name": "bills.jsonl", "columns": {"prompt": "question", "response": "answer"}},
    "notes": {"file_name": "notes.jsonl", "columns": {"prompt": "question", "response": "answer"}},
    "talks": {"hf_hub_url": "acme/talks", "formatting": "sharegpt"},
    "films": {"file_name": "films.json", "formatting": "sharegpt", "columns": {"videos": "videos"}},
}


def refused_of(conversion: Conversion) -> dict[str, str]:
    return {line.key: line.reason for line in conversion.refused}


def stage_of(conversion: Conversion) -> dict[str, Any]:
    (stage,) = conversion.recipe["stages"].values()
    assert isinstance(stage, dict)
    return stage
