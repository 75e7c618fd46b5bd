"""TRL's side of `rl.py`: GRPOTrainer and RLOOTrainer of the version that is installed, PPOTrainer of 1.12.

python benchmarks/rl_trl.py TASK.json FOUND.json
"""

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

Task = dict[str, Any]


class Clock(transformers.TrainerCallback):
    """Notes when iterations end."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first iteration."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    on_step_end = on_train_begin


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """1 for 10 to 30 words, less outside; as the rule `length` of our side has it."""
    words = [len(text.split()) for text in completions]
    return [max(0.0, 1 - max(10 - count, count - 30, 0) / 21) for count in words]


def main() -> None:
    """Train, and write what it took."""
    asked, answer = map(Path, sys.argv[1:])
    task = json.loads(asked.read_text())
    torch.set_num_threads(task["threads"])
    clock = Clock()
    rows = datasets.load_dataset("json", data_files=task["prompts"], split="train")
    with tempfile.TemporaryDirectory() as folder:
        build = ppo if task["algorithm"] == "ppo" else compared
        trainer = build(task, settings_of(task, folder), rows, clock)
        trainer.train()
    key = "completions/mean_length"
    lengths = [line[key] for line in trainer.state.log_history if key in line]
    found = {
        "cpu": [end - start for start, end in pairwise(clock.cpu[1:])],
        "wall": [end - start for start, end in pairwise(clock.wall[1:])],
        "response_tokens": statistics.mean(lengths) if lengths else task["new_tokens"],
        "parts": {},
        "says": f"{trl.__version__} " + ("bf16" if trainer.args.bf16 else "fp32"),
    }
    answer.write_text(json.dumps(found))


def settings_of(task: Task, folder: str) -> dict[str, Any]:
    """What all of TRL's trainers are given."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": task["micro_batch"],
        "gradient_accumulation_steps": task["samples"] // task["micro_batch"],
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if task["setting"] != "default":
        settings |= {"bf16": task["setting"] == "bf16", "gradient_checkpointing": False}
    return settings


def compared(task: Task, settings: dict[str, Any], rows: Any, clock: Clock) -> Any:
    """GRPO or RLOO: an optimiser step for each generation, as by default."""
    config, trainer = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[task["algorithm"]]
    arguments = config(
        **settings,
        num_generations=task["group"],
        max_completion_length=task["new_tokens"],
        beta=task["kl_coef"],
        max_steps=task["iterations"],
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    return trainer(task["model"], length_reward, arguments, rows, processing_class=tokenizer, callbacks=[clock])


def ppo(task: Task, settings: dict[str, Any], rows: Any, clock: Clock) -> Any:
    """PPO with four models."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    arguments = PPOConfig(
        **settings,
        num_ppo_epochs=task["epochs"],
        num_mini_batches=1,
        total_episodes=task["samples"] * task["iterations"],
        response_length=task["new_tokens"],
        temperature=1.0,
        stop_token="eos",
        kl_coef=task["kl_coef"],
        num_sample_generations=0,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    writes, scores = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    policy, reference = (writes.from_pretrained(task["model"], dtype=torch.float32) for _ in range(2))
    reward, value = (scores.from_pretrained(task["reward"], dtype=torch.float32) for _ in range(2))
    tokens = rows.map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=rows.column_names
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=tokens,
        eval_dataset=tokens.select(range(task["samples"])),
        callbacks=[clock],
    )


if __name__ == "__main__":
    main()
