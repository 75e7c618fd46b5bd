"""Training by default settings against the settings that were the default before: fp32 under DeepSpeed's ZeRO 2.

    python benchmarks/default_settings.py [--model 1m 30m] [--folder MODEL] [--sides defaults before] [--rounds 2]

Each side is a run of the same recipe as `trainwright run` makes it, on an embedded Ray with as many workers as `auto`
gives: a llama of the quickstart's shape (1m) or eight layers of width 512 (30m) on the documentation that Python
carries, or with `--folder` that model tuned on its chats (LoRA). Nothing is evaluated or saved on the way. Sides take
turns. Printed are the time of a step by the wall (the median after the first two, and the least, which a busy machine
disturbs less), that of the whole run, and the ratios of each side's steps to the first one's.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import launch
from launch.records.record import RunRecord
from recipes.recipe import Recipe
from trainers.store.store import Store

BEFORE = {"engine": "deepspeed", "zero": 2, "precision": "fp32"}
SIDES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "before": BEFORE,
    **{f"{precision}-plain": {"engine": "plain", "precision": precision} for precision in ("fp32", "bf16")},
    **{
        f"{precision}-zero{zero}": {**BEFORE, "zero": zero, "precision": precision}
        for precision in ("fp32", "bf16")
        for zero in (0, 1, 2, 3)
    },
}
LLAMA = {"family": "decoder", "type": "llama"}
MODELS: dict[str, dict[str, Any]] = {
    "1m": {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4},
    "30m": {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8},
}
BATCHES = {"1m": (16, 256), "30m": (8, 512), "folder": (8, 256)}
"""Rows of a step, and their tokens."""
ROWS = 1000
"""Of the documentation: enough for the steps."""
WARM_STEPS = 2


@dataclass(frozen=True)
class Found:
    """What one run took, in seconds, and what its stage ran in."""

    median: float
    least: float
    whole: float
    shard: str


def recipe_of(model: str, folder: str | None, steps: int, shard: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one side."""
    rows, length = BATCHES[model]
    train: dict[str, Any] = {"steps": steps, "global_batch": rows, "sequence_length": length}
    train |= {"optimizer": {"lr": 1e-3}, "save_every": 10**6, "evaluate_every": 10**6, "evaluation_rows": 8}
    source = {"source": "python-docs", "split": "train", "limit": ROWS}
    stage: dict[str, Any] = {"data": source, "train": train, **({"shard": shard} if shard else {})}
    if folder is not None:
        stage |= {"kind": "finetune", "init_from": folder, "lora": {"r": 16, "alpha": 32}}
    else:
        stage |= {"kind": "pretrain", "tokenizer": {"train": "bpe", "vocab_size": 2048}}
        stage["architecture"] = {**LLAMA, **MODELS[model], "max_position_embeddings": length}
    return {"name": "speed", "stages": {"model": stage}}


def run_side(model: str, folder: str | None, steps: int, shard: dict[str, Any], place: Path) -> Found:
    """Run one side in a separate store."""
    path = place / "speed.yaml"
    path.write_text(yaml.safe_dump(recipe_of(model, folder, steps, shard)))
    with tempfile.TemporaryDirectory(dir=place) as store:
        started = time.monotonic()
        result = launch.run(path, store=store)
        whole = time.monotonic() - started
        record = RunRecord.open(Store.open(store), result.run)
        taken = [line["values"]["step_s"] for line in record.metrics("model") if "step_s" in line["values"]]
        settled: Recipe = record.resolved().recipe
        chosen = settled.stages["model"].shard
    taken = taken[WARM_STEPS:]
    return Found(statistics.median(taken), min(taken), whole, f"{chosen.precision} {chosen.engine_text}")


def measure(model: str, sides: list[str], folder: str | None, steps: int, rounds: int) -> None:
    """Let the sides take turns, and print the round so far after each."""
    firsts: list[Found] = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            for side in sides:
                found = run_side(model, folder, steps, SIDES[side], Path(place))
                if side == sides[0]:
                    firsts.append(found)
                first = firsts[number]
                print(
                    f"{model:<7} {side:<11} {found.shard:<12} step {1e3 * found.median:8.1f} ms, least "
                    f"{1e3 * found.least:8.1f}  run {found.whole:6.1f} s  over {sides[0]}: median "
                    f"{found.median / first.median:5.2f}, least {found.least / first.least:5.2f}",
                    flush=True,
                )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["1m", "30m"], choices=list(MODELS))
    parser.add_argument("--folder", help="a language model of the Hugging Face layout, instead of --model")
    parser.add_argument("--sides", nargs="+", default=["defaults", "before"], choices=list(SIDES))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    for model in ["folder"] if arguments.folder else arguments.model:
        measure(model, arguments.sides, arguments.folder, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
