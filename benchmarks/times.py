"""Time that `trainwright plan` predicts of a step against the CPU time that it takes, after a calibration.

    python -m benchmarks.times [NAME]...

One thread, plain engine, CPU time of the process: what else runs on the machine counts only as far as it slows the
processor down, and alike in calibration and measurement.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from launch.capacity.calibration import rates_of
from recipes.models.decoder import Gpt2, Llama
from recipes.models.known_models import KnownModel
from recipes.planning.cost import Flops, Rates, stage_seconds, text_flops
from recipes.planning.memory import predict_sizes
from recipes.stages.finetune import Finetune
from trainers.data.batches import TokenBatch
from trainers.engine.build import build_engine, parameter_group
from trainers.models.decoder import build_decoder
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective
from trainers.training.calibration import measure

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A model, and a step of rows of so many tokens."""

    architecture: Any
    vocabulary: int
    rows: int
    length: int
    lora: dict[str, Any] | None = None
    shard: dict[str, Any] = field(default_factory=dict)


def llama(width: int, layers: int, heads: int) -> Llama:
    """A llama of common proportions."""
    return Llama(
        family="decoder",
        type="llama",
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


SHAPES = {
    "1M": Shape(llama(128, 4, 4), 2048, 8, 256),
    "7M": Shape(llama(256, 6, 4), 8192, 8, 256),
    "7M-long": Shape(llama(256, 6, 4), 8192, 1, 1024),
    "10M": Shape(llama(384, 4, 8), 8192, 2, 512),
    "lora": Shape(llama(128, 4, 4), 2048, 8, 256, lora={"r": 16}),
    "gpt2": Shape(Gpt2(family="decoder", type="gpt2", n_embd=256, n_layer=4, n_head=4), 8192, 4, 256),
    "recomputed": Shape(llama(256, 6, 4), 8192, 4, 256, shard={"gradient_checkpointing": True}),
}


def stage_of(shape: Shape, precision: str) -> Finetune:
    """The shape as a recipe's stage of one step."""
    train = {"steps": 1, "global_batch": shape.rows, "sequence_length": shape.length, "optimizer": {"lr": 1e-3}}
    shard = {"engine": "plain", "precision": precision, "micro_batch": shape.rows, **shape.shard}
    stage = {"kind": "finetune", "init_from": "base", "data": {"source": "python-docs"}, "train": train, "shard": shard}
    return Finetune.model_validate({**stage, **({} if shape.lora is None else {"lora": shape.lora})})


def predicted_seconds(shape: Shape, stage: Finetune, rates: Rates) -> float:
    """What the plan says of a step."""
    flops = Flops(training=text_flops(stage, shape.architecture, shape.vocabulary, 1).training)
    sizes = predict_sizes(stage, KnownModel(shape.architecture, shape.vocabulary), 1, shape.rows)
    of = shape.architecture.shape()
    return stage_seconds(flops, stage.shard, sizes, 1, rates, 1, [], of, is_adapted=stage.lora is not None)


def measured_seconds(shape: Shape, stage: Finetune) -> float:
    """CPU time of the fastest of two steps after the first."""
    keys = shape.architecture.model_dump(exclude_none=True)
    model: Any = build_decoder(keys, TokenizerFacts(shape.vocabulary, 0, 1), seed=0, device=CPU)
    if stage.lora is not None:
        add_adapter(model, stage.lora, seed=0)
    module, objective = TokenLosses(model), LanguageModelObjective()
    group = parameter_group("model", module, stage.train.optimizer)
    engine = build_engine(module, [group], stage.shard, clip=1.0, device=CPU)
    engine.module.train()
    ids = torch.randint(2, shape.vocabulary, (shape.rows, shape.length))
    ones, places = torch.ones_like(ids), torch.arange(shape.length).expand_as(ids)
    batch = TokenBatch(ids, ones, places, ones.bool(), torch.arange(shape.rows))
    taken = []
    for _ in range(3):
        started = time.process_time()
        engine.backward(objective.loss(engine.module, batch).loss_sum / objective.weight(batch))
        engine.step({"model": 1e-3})
        taken.append(time.process_time() - started)
    return min(taken[1:])


def main(arguments: Sequence[str]) -> None:
    """Calibrate, then print a line per shape and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"shapes; none: all of {', '.join(SHAPES)}")
    names = parser.parse_args(arguments).names
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"no such shape: {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    rates = rates_of(measure(CPU), "")
    print(f"{'shape':12} {'':4} {'predicted':>10} {'measured':>10} {'ratio':>6}")
    for name in names or SHAPES:
        for precision in ("fp32", "bf16"):
            stage = stage_of(SHAPES[name], precision)
            predicted, measured = (
                predicted_seconds(SHAPES[name], stage, rates),
                measured_seconds(SHAPES[name], stage),
            )
            print(f"{name:12} {precision} {predicted:8.3f} s {measured:8.3f} s {predicted / measured:6.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
