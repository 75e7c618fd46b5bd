"""What the driver hears of a stage's progress: one unit per kind of stage, and speeds that say what they count."""

from typing import Any

import pytest

from launch.stages import StageObserver, progress_of
from recipes.load import parse_recipe
from recipes.stages import Stage

TRAIN = {"steps": 8, "global_batch": 4, "sequence_length": 16, "optimizer": {"lr": 1e-3}}
TEXT = {"source": "text", "files": ["a.txt"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SPECIAL = {"cls_token": "<|cls|>", "mask_token": "<|mask|>"}
STAGES: dict[str, dict[str, Any]] = {
    "base": {
        "kind": "pretrain",
        "architecture": {"family": "decoder", "type": "llama", **SIZES},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": TEXT,
        "train": TRAIN,
    },
    "words": {
        "kind": "pretrain",
        "architecture": {"family": "encoder", "type": "bert", **SIZES},
        "tokenizer": {"train": "bpe", "vocab_size": 300, **SPECIAL},
        "data": TEXT,
        "train": TRAIN,
    },
    "chat": {"kind": "finetune", "init_from": "./base", "data": TEXT, "train": TRAIN},
    "judge": {"kind": "reward", "init_from": "chat", "data": TEXT, "train": TRAIN},
    "policy": {
        "kind": "ppo",
        "actor": "chat",
        "reward": "judge",
        "prompts": TEXT,
        "rollout": {"prompts_per_iteration": 8, "samples_per_prompt": 2, "max_new_tokens": 8},
        "ppo": {"iterations": 3, "epochs": 2, "mini_batches": 2, "optimizer": {"lr": 1e-3}},
    },
}


class Rank:
    """A rank other than the first, which writes no metrics."""

    rank = 1

    def __init__(self) -> None:
        self.beats: list[tuple[str, dict[str, Any]]] = []

    def beat(self, phase: str, **values: Any) -> None:
        self.beats.append((phase, values))


def observer_of(stage: str, rank: Rank, started_from: str | None = None) -> StageObserver:
    spec: Stage = parse_recipe({"name": "a", "stages": STAGES}).stages[stage]
    return StageObserver(rank, None, {}, progress_of(spec, started_from))  # type: ignore[arg-type]


def test_ppo_counts_iterations_in_rollouts_and_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    rank = Rank()
    observer = observer_of("policy", rank)
    for step in range(13):
        if step % 4 == 0:
            clock[0] += 4.0
            observer.phase("rollout", step=step, steps_planned=12)
            observer.metrics(step, {"score_mean": 0.5, "kl": 0.0, "iteration": step / 4})
        if step < 12:
            observer.phase("train", step=step, steps_planned=12)
            observer.metrics(step, {"loss": 9.0, "weight": 40.0, "step_s": 0.01})
    assert [(values["step"], values["steps"], values["unit"]) for _, values in rank.beats] == [
        (iteration, 3, "iteration") for iteration in range(3) for _ in range(5)
    ] + [(3, 3, "iteration")]
    last = rank.beats[-1][1]
    assert last["responses_per_s"] == pytest.approx(16 / 4.0)
    assert last["score"] == 0.5
    assert "loss" not in last


@pytest.mark.parametrize(
    ("stage", "started_from", "counted"),
    [
        ("chat", "llama", "target_tokens"),
        ("chat", "bert", "rows"),
        ("chat", None, "target_tokens"),
        ("words", None, "target_tokens"),
        ("base", None, "tokens"),
        ("judge", "llama", "pairs"),
    ],
)
def test_a_speed_says_what_it_counts(stage: str, started_from: str | None, counted: str) -> None:
    rank = Rank()
    observer = observer_of(stage, rank, started_from)
    observer.metrics(1, {"loss": 1.0, "weight": 30.0, "step_s": 0.5})
    observer.phase("train", step=1, steps_planned=8)
    assert rank.beats[-1][1] == {"loss": 1.0, f"{counted}_per_s": 60.0, "step": 1, "steps": 8, "unit": "step"}
