"""Predicted memory of a worker against what a process really takes: weights, optimiser and three training steps.

    python benchmarks/memory.py [NAME]...

Every shape runs in a process of its own on the CPU: the plain engine, or DeepSpeed's ZeRO with one worker. Measured is
the highest resident size during build and steps, less what the process held after its imports. The prediction is what
`trainwright plan` prints (`recipes/planning/memory.py`).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.planning.memory import predict_sizes
from recipes.stages.finetune import Finetune
from recipes.stages.preference import Preference
from recipes.stages.pretrain import Pretrain
from recipes.stages.reward import Reward

VOCABULARY = 12_000
PLAIN = {"engine": "plain", "precision": "fp32"}
SHARDED = {"engine": "deepspeed", "zero": 2, "precision": "fp32"}
WIDE = {"num_hidden_layers": 4, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8}
LONG = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}


@dataclass(frozen=True)
class Shape:
    """A stage's kind, its model, and what a micro-batch holds."""

    kind: str
    architecture: dict[str, Any]
    sequence_length: int
    micro_batch: int
    shard: dict[str, Any]
    lora: dict[str, Any] | None = None


SHAPES = {
    "weights": Shape("pretrain", WIDE, 64, 2, PLAIN),
    "weights-zero2": Shape("pretrain", WIDE, 64, 2, SHARDED),
    "weights-bf16": Shape("pretrain", WIDE, 64, 2, {**SHARDED, "precision": "bf16"}),
    "activations": Shape("pretrain", LONG, 256, 8, PLAIN),
    "attention": Shape("pretrain", LONG, 768, 2, PLAIN),
    "lora": Shape("finetune", WIDE, 128, 8, PLAIN, {"r": 8}),
    "reward": Shape("reward", LONG, 256, 8, PLAIN),
    "preference": Shape("preference", LONG, 128, 4, PLAIN),
    "preference-lora": Shape("preference", WIDE, 128, 4, PLAIN, {"r": 8}),
}


def stage_of(shape: Shape) -> Pretrain | Finetune | Preference | Reward:
    """The shape as a recipe's stage."""
    train = {"steps": 3, "global_batch": shape.micro_batch, "sequence_length": shape.sequence_length}
    common = {
        "kind": shape.kind,
        "data": {"source": "python-docs"},
        "train": {**train, "optimizer": {"lr": 1e-3}},
        "shard": {**shape.shard, "micro_batch": shape.micro_batch},
    }
    match shape.kind:
        case "pretrain":
            architecture = {"family": "decoder", "type": "llama", "max_position_embeddings": 1024, **shape.architecture}
            tokenizer = {"train": "bpe", "vocab_size": VOCABULARY}
            return Pretrain.model_validate({**common, "architecture": architecture, "tokenizer": tokenizer})
        case "finetune":
            return Finetune.model_validate({**common, "init_from": "base", "lora": shape.lora})
        case "preference":
            return Preference.model_validate({**common, "init_from": "base", "lora": shape.lora})
        case _:
            return Reward.model_validate({**common, "init_from": "base"})


def predicted_bytes(shape: Shape) -> int:
    """What the plan says of one worker."""
    architecture = stage_of(Shape("pretrain", shape.architecture, 64, 1, {})).architecture
    sizes = predict_sizes(stage_of(shape), architecture, VOCABULARY, 1, shape.micro_batch)
    return sizes.memory_per_worker_bytes


def measured_bytes(name: str) -> int:
    """What a process of its own takes beyond its imports."""
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name],
        env=os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(shape: Shape) -> int:
    """Build the model and its engine, take three steps; the peak in bytes beyond what was there before."""
    import torch

    import trainers.runtime.preload
    from rlhf.text.preference_objective import AnswerLogprobs, PreferenceObjective, Referred
    from rlhf.text.reward_model import RewardObjective, ScoreModel
    from trainers.data.batches import PairBatch, SequenceBatch, TokenBatch
    from trainers.engine.build import build_engine, parameter_group
    from trainers.models.decoder import build_decoder
    from trainers.models.load import stock_class
    from trainers.models.lora import add_adapter
    from trainers.models.protocol import TokenizerFacts
    from trainers.models.token_losses import TokenLosses
    from trainers.objectives.language_model import LanguageModelObjective

    stage, cpu = stage_of(shape), torch.device("cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if stage.shard.engine == "deepspeed":
        import trainers.engine.deepspeed  # noqa: F401
    if shape.lora is not None:
        import peft  # noqa: F401
    stock_class("llama", "language_model")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    architecture = {"type": "llama", "max_position_embeddings": 1024, **shape.architecture}
    model: Any = build_decoder(architecture, TokenizerFacts(VOCABULARY, 0, 1), seed=0, device=cpu)
    ids = torch.randint(2, VOCABULARY, (shape.micro_batch, shape.sequence_length))
    rows, ones = torch.arange(shape.micro_batch), torch.ones_like(ids)
    objective: Any
    batch: Any
    if isinstance(stage, Reward):
        score: Any = stock_class("llama", "score_model")(_with_one_label(model.config))
        score.base_model.load_state_dict(model.base_model.state_dict(), assign=True)
        module: Any = ScoreModel(score)
        side = SequenceBatch(ids, ones.bool(), ones.bool())
        objective, batch = RewardObjective(0.0), PairBatch(side, side, rows)
        del model
    else:
        if stage_lora := getattr(stage, "lora", None):
            add_adapter(model, stage_lora, seed=0)
        if isinstance(stage, Preference):
            module, objective = AnswerLogprobs(model), PreferenceObjective(stage.loss)
            side = SequenceBatch(ids, ones.bool(), ones.bool())
            batch = Referred(PairBatch(side, side, rows), torch.zeros(len(rows), 2))
        else:
            module, objective = TokenLosses(model), LanguageModelObjective()
            places = torch.arange(shape.sequence_length).expand_as(ids)
            batch = TokenBatch(ids, ones, places, ones.bool(), rows)
        del model
    group = parameter_group("model", module, stage.train.optimizer)
    engine = build_engine(module, [group], stage.shard, clip=1.0, device=cpu)
    engine.module.train()
    for _ in range(3):
        output = objective.loss(engine.module, batch)
        engine.backward(output.loss_sum / objective.weight(batch))
        engine.step({"model": 1e-3})
    return _status("VmHWM") - before


def _with_one_label(config: Any) -> Any:
    config.num_labels = 1
    return config


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main(names: list[str]) -> None:
    """Print a line per shape."""
    print(f"{'shape':14} {'predicted':>10} {'measured':>10} {'ratio':>6}")
    for name in names or SHAPES:
        predicted, measured = predicted_bytes(SHAPES[name]), measured_bytes(name)
        print(
            f"{name:14} {predicted / 2**20:6.0f} MiB {measured / 2**20:6.0f} MiB {predicted / measured:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(SHAPES[sys.argv[2]])))
    else:
        main(sys.argv[1:])
