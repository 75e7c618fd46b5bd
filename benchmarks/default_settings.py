"""Training by default settings against the settings that were the default before: fp32 under DeepSpeed's ZeRO 2.

    python benchmarks/default_settings.py [--model 1m 30m] [--folder MODEL] [--sides defaults before] [--rounds 2]

Each side is a run of the same recipe as `trainwright run` makes it, on an embedded Ray with as many workers as `auto`
gives: a llama of the quickstart's shape (1m) or eight layers of width 512 (30m) on the documentation that Python
carries, or with `--folder` that model tuned on its chats (LoRA). Nothing is evaluated or saved on the way. Sides take
turns. Printed are seconds of a step by the wall (the median after the first two), of the whole run, and the ratio of
each side's step to the first one's.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import launch
from launch.records import RunRecord
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
WARM_STEPS = 2


def recipe_of(model: str, folder: str | None, steps: int, shard: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one side."""
    rows, length = BATCHES[model]
    train: dict[str, Any] = {"steps": steps, "global_batch": rows, "sequence_length": length}
    train |= {"optimizer": {"lr": 1e-3}, "save_every": 10**6, "evaluate_every": 10**6, "evaluation_rows": 8}
    source = {"source": "python-docs", "split": "train"}
    stage: dict[str, Any] = {"data": source, "train": train, **({"shard": shard} if shard else {})}
    if folder is not None:
        stage |= {"kind": "finetune", "init_from": folder, "lora": {"r": 16, "alpha": 32}}
    else:
        stage |= {"kind": "pretrain", "tokenizer": {"train": "bpe", "vocab_size": 2048}}
        stage["architecture"] = {**LLAMA, **MODELS[model], "max_position_embeddings": length}
    return {"name": "speed", "stages": {"model": stage}}


def run_side(
    model: str, folder: str | None, steps: int, shard: dict[str, Any], place: Path
) -> tuple[float, float, str]:
    """Seconds of a step, of the run, and what the stage ran in."""
    path = place / "speed.yaml"
    path.write_text(yaml.safe_dump(recipe_of(model, folder, steps, shard)))
    with tempfile.TemporaryDirectory(dir=place) as store:
        started = time.monotonic()
        result = launch.run(path, store=store)
        seconds = time.monotonic() - started
        record = RunRecord.open(Store.open(store), result.run)
        lines = [line["values"]["step_s"] for line in record.metrics("model") if "step_s" in line["values"]]
        settled: Recipe = record.resolved().recipe
        chosen = settled.stages["model"].shard
    return statistics.median(lines[WARM_STEPS:]), seconds, f"{chosen.precision} {chosen.engine_text}"


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
        found: dict[str, list[tuple[float, float, str]]] = {side: [] for side in arguments.sides}
        with tempfile.TemporaryDirectory() as place:
            for _ in range(arguments.rounds):
                for side in arguments.sides:
                    found[side].append(run_side(model, arguments.folder, arguments.steps, SIDES[side], Path(place)))
        first = found[arguments.sides[0]]
        for side, rounds in found.items():
            step, whole = (statistics.median(one[part] for one in rounds) for part in (0, 1))
            ratios = [one[0] / mine[0] for one, mine in zip(rounds, first, strict=True)]
            print(
                f"{model:<7} {side:<11} {rounds[0][2]:<12} step {1e3 * step:8.1f} ms  run {whole:6.1f} s  "
                f"step over {arguments.sides[0]}'s {statistics.median(ratios):5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
