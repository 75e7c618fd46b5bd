"""Samples per second of reinforcement learning against TRL: its GRPO and RLOO, and the PPO of its version 1.12.

    python benchmarks/rl.py [--algorithms grpo rloo ppo] [--model FOLDER] [--rounds 2] [--iterations 8] [--json FILE]

Both sides tune the same model (a llama of 2.6 million parameters with random weights, or a language model's folder) on
the same prompts of one length, with equally many samples, new tokens, updates and epochs, the whole model learning by
AdamW; GRPO and RLOO by a rule on a response's length, PPO by a reward model of the same shape, next to a reference and
a critic. Each side is a process, on `--threads`; sides take turns. An iteration is rollouts and update; the first of a
process warms up and is not counted.

`fp32` and `bf16`: both sides in that precision (TRL by autocast), micro-batches of the same size, and TRL without its
gradient checkpointing. `default`: what each side chooses by itself where the recipe or TRL's configuration says
nothing: precision, gradient checkpointing, and on our side micro-batches. Ratios are of samples per CPU second and per
second of the wall, ours over TRL's: of medians, and of the best iterations, which a busy machine disturbs least.
`--json` writes them with everything measured; `trl_grpo` and the like are the `default` ones by CPU time.

TRL 1.16 has no PPO any more: 1.12 is installed by pip, without what it depends on, into a temporary folder, and runs
on the same torch and transformers. Where that fails its row is skipped with the reason.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from cluster.rank_process import rank_environment
from recipes.data.tokenizers import TrainTokenizer
from trainers.data.tokenizer import Tokenization, load_tokenization, train_tokenizer
from trainers.models.decoder import build_decoder
from trainers.models.folders import write_model
from trainers.models.protocol import TokenizerFacts

HERE = Path(__file__).parent
LLAMA = {
    "type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "tie_word_embeddings": True,
}
VOCABULARY = 4096
PPO_VERSION = "1.12.0"
SETTINGS = ("fp32", "bf16", "default")
NUM_PROMPTS = 64


@dataclass(frozen=True)
class Task:
    """What a side does; it reads this from a file."""

    algorithm: str
    setting: str
    model: str
    """Folder of the language model."""
    reward: str
    """Folder of the reward model; only PPO reads it."""
    prompts: str
    """JSON lines with `prompt`."""
    samples: int
    """Of an iteration."""
    group: int
    """Responses to a prompt."""
    prompt_tokens: int
    new_tokens: int
    micro_batch: int
    iterations: int
    epochs: int
    kl_coef: float
    threads: int


@dataclass(frozen=True)
class Found:
    """Seconds of each iteration of one process but its first, and the tokens of a response."""

    cpu: list[float]
    wall: list[float]
    response_tokens: float
    parts: Mapping[str, float]
    """CPU seconds of an iteration by what is done, where the side says so."""
    says: str
    """What it runs in."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "rloo", "ppo"], choices=["grpo", "rloo", "ppo"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--model", type=Path, help="folder of a language model; default: the small llama")
    sizes = {"rounds": 2, "iterations": 8, "samples": 32, "group": 8, "prompt-tokens": 32, "new-tokens": 64}
    for name, value in {**sizes, "micro-batch": 8, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="file for the ratios and all that was measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = options.model or small_model(place / "model", options)
        if "ppo" in options.algorithms:
            reward_model(model, place / "reward")
        prompts(load_tokenization(model), options.prompt_tokens, place / "prompts.jsonl")
        ratios: dict[str, float] = {}
        measured: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        for algorithm in options.algorithms:
            path = ""
            if algorithm == "ppo":
                path, reason = ppo_of_trl(place / "trl-ppo")
                if reason:
                    skipped["trl_ppo"] = reason
                    print(f"trl_ppo: skipped: {reason}")
                    continue
            for setting in options.settings:
                task = task_of(algorithm, setting, options, model, place)
                found = take_turns(task, options.rounds, place, path)
                measured[f"{algorithm} {setting}"] = {
                    side: [asdict(one) for one in runs] for side, runs in found.items()
                }
                ratios |= compared(task, found)
    if options.json:
        versions = {name: version(name) for name in ("torch", "transformers", "trl")} | {"trl of ppo": PPO_VERSION}
        whole = {"ratios": ratios, "skipped": skipped, "measured": measured, "versions": versions}
        options.json.write_text(json.dumps(whole, indent=2, default=str))


def task_of(algorithm: str, setting: str, options: argparse.Namespace, model: Path, place: Path) -> Task:
    """The task of one row; coefficients and epochs are TRL's defaults."""
    epochs, kl_coef = {"grpo": (1, 0.0), "rloo": (1, 0.05), "ppo": (4, 0.05)}[algorithm]
    return Task(
        algorithm,
        setting,
        str(model.absolute()),
        str(place / "reward"),
        str(place / "prompts.jsonl"),
        options.samples,
        1 if algorithm == "ppo" else options.group,
        options.prompt_tokens,
        options.new_tokens,
        options.micro_batch,
        options.iterations,
        epochs,
        kl_coef,
        options.threads,
    )


def take_turns(task: Task, rounds: int, place: Path, path: str) -> dict[str, list[Found]]:
    """Run both sides so often, in turn; each in a process."""
    found: dict[str, list[Found]] = {"ours": [], "trl": []}
    for _ in range(rounds):
        found["ours"].append(run_side("rl_ours.py", task, place, rank_environment(os.environ, {}, task.threads, False)))
        threads = {"OMP_NUM_THREADS": str(task.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        there = {"PYTHONPATH": path} if path else {}
        found["trl"].append(run_side("rl_trl.py", task, place, {**os.environ, **threads, **there}))
    return found


def run_side(script: str, task: Task, place: Path, environment: Mapping[str, str]) -> Found:
    """One process; raises RuntimeError with the end of its output where it fails."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        asked, answer = Path(folder) / "task.json", Path(folder) / "found.json"
        asked.write_text(json.dumps(asdict(task)))
        command = [sys.executable, str(HERE / script), str(asked), str(answer)]
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(
                f"{script} {task.algorithm} {task.setting} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return Found(**json.loads(answer.read_text()))


def compared(task: Task, found: Mapping[str, Sequence[Found]]) -> dict[str, float]:
    """Print a row, and return its ratios by name."""
    ratios: dict[str, float] = {}
    name = f"trl_{task.algorithm}" + ("" if task.setting == "default" else f"_{task.setting}")
    for side, runs in found.items():
        cpu, wall = ([second for run in runs for second in getattr(run, clock)] for clock in ("cpu", "wall"))
        tokens = statistics.mean(run.response_tokens for run in runs)
        parts = {part: statistics.mean(run.parts[part] for run in runs) for part in runs[0].parts}
        print(
            f"{task.algorithm} {task.setting:<8} {side:<5} {runs[0].says:<22} samples/CPU s: median "
            f"{task.samples / statistics.median(cpu):7.2f}, best {task.samples / min(cpu):7.2f}; samples/s of the wall "
            f"{task.samples / statistics.median(wall):7.2f}; {tokens:.1f} tokens a response"
            + "".join(f"; {part} {seconds:.2f} s" for part, seconds in parts.items()),
            flush=True,
        )
    for clock, ending in (("cpu", ""), ("wall", "_wall")):
        ours, theirs = ([second for run in found[side] for second in getattr(run, clock)] for side in ("ours", "trl"))
        ratios[name + ending] = statistics.median(theirs) / statistics.median(ours)
        ratios[f"{name}{ending}_best"] = min(theirs) / min(ours)
    print("   " + ", ".join(f"{key} x{value:.2f}" for key, value in ratios.items()), flush=True)
    return ratios


def small_model(folder: Path, options: argparse.Namespace) -> Path:
    """A llama with random weights, and a tokenizer trained on sources of the standard library."""
    tokenization = train_tokenizer(TrainTokenizer(train="bpe", vocab_size=VOCABULARY), texts())
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id)
    # PPO's reward model reads an end token after a response that the limit cut off.
    sizes = {**LLAMA, "max_position_embeddings": options.prompt_tokens + options.new_tokens + 1}
    model: Any = build_decoder(sizes, facts, seed=0, device=torch.device("cpu"))
    tensors, files = list(model.named_parameters()), tokenization.files()
    write_model(folder, "language_model", model.config, tensors, files, dtype=torch.float32)
    return folder


def reward_model(model: Path, folder: Path) -> None:
    """A reward model of the language model's shape with random weights, in its tokenizer."""
    config = AutoConfig.from_pretrained(model, num_labels=1)
    torch.manual_seed(1)
    made = AutoModelForSequenceClassification.from_config(config)
    files = load_tokenization(model).files()
    write_model(folder, "score_model", made.config, list(made.named_parameters()), files, dtype=torch.float32)


def texts() -> list[str]:
    """Sources of modules of the standard library, paragraph by paragraph."""
    return [
        part for module in (argparse, inspect, subprocess, tempfile) for part in inspect.getsource(module).split("\n\n")
    ]


def prompts(tokenization: Tokenization, length: int, path: Path) -> None:
    """Write prompts that have exactly so many tokens."""
    tokens = tokenization.encode("\n\n".join(texts()))
    rows: list[str] = []
    for start in range(0, len(tokens) - length, length):
        text = tokenization.decode(tokens[start : start + length])
        if len(tokenization.encode(text)) == length:
            rows.append(text)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows[:NUM_PROMPTS]))


def ppo_of_trl(folder: Path) -> tuple[str, str]:
    """Install the last TRL that has PPO, alone; the folder to import it from, or why there is none."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"trl=={PPO_VERSION}"], capture_output=True, text=True)
    return (str(folder), "") if done.returncode == 0 else ("", f"pip: {done.stderr.strip()[-300:]}")


if __name__ == "__main__":
    main()
