"""What this machine gets done: products, training and sampling of small models, reading of memory.

    python -m trainers.training.calibration

Prints JSON. A worker on CPUs has one thread, so rates are those of one, by the process's CPU time: what else runs on
the machine does not count. On a GPU they are those of the device, by the clock.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.data.text import PythonDocs
from recipes.models.decoder import Llama
from recipes.planning.cost import text_flops
from recipes.stages.finetune import Finetune
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from recipes.stages.train import Train
from trainers.data.batches import TokenBatch
from trainers.engine.build import build_engine, parameter_group
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.decoder import build_decoder
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective
from trainers.runtime.precision import dtype_of, use_fast_matmul

VOCABULARY = 4096
LENGTH = 256
LAYERS = 2
WIDTHS = {"cpu": (64, 256, 768), "cuda": (512, 2048)}
"""Widths that training is measured at; rates between them are interpolated."""
ROWS = {"cpu": 4, "cuda": 32}
PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices that are multiplied."""
COPIED_BYTES = 256 << 20
REPEATS = 2
WRITTEN, WRITTEN_ROWS = 48, 32
"""Tokens that are written after a prompt, and rows at once."""


def measure(device: torch.device) -> dict[str, Any]:
    """Return rates by precision (and width), the memory's, and the seconds of a layer for one more token of a row."""
    use_fast_matmul(device)
    precisions = ("fp32", "bf16")
    layer_s, writing = _writing(device)
    return {
        "products": {precision: _products(device, dtype_of(precision)) for precision in precisions},
        **{
            what: {
                precision: {str(width): _training(device, width, precision, lora) for width in WIDTHS[device.type]}
                for precision in precisions
            }
            for what, lora in (("training", None), ("adapters", Lora(r=16, alpha=32)))
        },
        "convolutions": {precision: _convolutions(device, dtype_of(precision)) for precision in precisions},
        "bytes_per_s": _bandwidth(device),
        "layer_s": layer_s,
        "writing": writing,
    }


def process_bytes() -> int:
    """Return the proportional size (PSS) of a worker on CPUs that holds no model to speak of.

    Of a fork of this process, which has imported what a worker imports, after steps of the smallest model: pages of
    libraries count by half there, as they do in a worker and the server that it is forked from.
    """
    import trainers.runtime.preload  # noqa: F401

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(process_bytes_here()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        found = int(said.read())
    os.waitpid(child, 0)
    return found


def process_bytes_here() -> int:
    """Return this process's proportional size after steps of the smallest model."""
    _training(torch.device("cpu"), 8, "fp32", None)
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None, "Linux has Pss in smaps_rollup"
    return int(found[1]) * 1024


def _fastest(device: torch.device, action: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the seconds of the fastest of a few repetitions, after one that does not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(1 + repeats):
        started = clock()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - started)
    return min(taken[1:])


def _products(device: torch.device, dtype: torch.dtype) -> float:
    side = PRODUCT[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(device, lambda: left @ right)


def _bandwidth(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _fastest(device, lambda: target.copy_(source))


def _llama(width: int) -> Llama:
    return Llama(
        family="decoder",
        type="llama",
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(2, width // 64),
        max_position_embeddings=2 * LENGTH,
    )


def _built(architecture: Llama, device: torch.device) -> nn.Module:
    keys = architecture.model_dump(exclude_none=True)
    return build_decoder(keys, TokenizerFacts(VOCABULARY, 0, 1), seed=0, device=device)


def _training(device: torch.device, width: int, precision: str, lora: Lora | None) -> float:
    """Return operations a second of forward and backward passes, counted as plans count them."""
    architecture, rows = _llama(width), ROWS[device.type]
    stage = Finetune(
        kind="finetune",
        init_from="model",
        lora=lora,
        data=PythonDocs(source="python-docs"),
        train=Train(steps=1, global_batch=rows, sequence_length=LENGTH, optimizer=AdamW(lr=1e-3)),
        shard=Shard(engine="plain", precision="bf16" if precision == "bf16" else "fp32"),
    )
    model = _built(architecture, device)
    if lora is not None:
        add_adapter(model, lora, seed=0)
    module = TokenLosses(model)
    groups = [parameter_group("model", module, stage.train.optimizer)]
    engine = build_engine(module, groups, stage.shard, clip=1.0, device=device)
    ids = torch.randint(2, VOCABULARY, (rows, LENGTH))
    ones, places = torch.ones_like(ids), torch.arange(LENGTH).expand_as(ids)
    batch = TokenBatch(ids, ones, places, ones.bool(), torch.arange(rows)).to(device)
    objective = LanguageModelObjective()

    def step() -> None:
        engine.backward(objective.loss(engine.module, batch).loss_sum / objective.weight(batch))

    return text_flops(stage, architecture, VOCABULARY, 1).training / _fastest(device, step)


def _convolutions(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a stack of convolutions, norms and activations, as diffusions have them."""
    channels, side, images = 32, 32, 16
    layers = [
        nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.SiLU())
        for _ in range(4)
    ]
    net = nn.Sequential(*layers).to(device, dtype)
    pixels = torch.randn(images, channels, side, side, device=device, dtype=dtype)

    def step() -> Tensor:
        loss: Tensor = net(pixels).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return 3 * 4 * images * 2 * 9 * channels**2 * side**2 / _fastest(device, step)


def _writing(device: torch.device) -> tuple[float, float]:
    """Return the seconds that a layer takes for one more token of a single row, which is what calls cost, and the
    operations a second that more rows reach on top of that.
    """
    architecture, rows = _llama(WIDTHS[device.type][1]), WRITTEN_ROWS
    single = _token_seconds(device, _llama(WIDTHS[device.type][0]), 1)
    many = _token_seconds(device, architecture, rows)
    head = 2 * VOCABULARY * architecture.hidden_size
    flops = rows * (2 * architecture.multiplied_parameters() + architecture.attention_flops(WRITTEN) + head)
    return single / LAYERS, flops / max(many - single, single / rows)


def _token_seconds(device: torch.device, architecture: Llama, rows: int) -> float:
    """Return the seconds of one more token of so many rows."""
    model = _built(architecture, device).to(device).eval()
    prompt = torch.full((rows, 2), 2, device=device)
    settings = SamplingSettings(WRITTEN, temperature=1.0, stop_ids=(), pad_id=0, num_tokens=VOCABULARY)
    uniforms = np.full((rows, WRITTEN), 0.5)
    whole = _fastest(device, lambda: generate(model, prompt, torch.ones_like(prompt), settings, uniforms), 5)
    return whole / WRITTEN


if __name__ == "__main__":
    torch.set_num_threads(1 if sys.argv[1] == "cpu" else torch.get_num_threads())
    measured = {"process_bytes": process_bytes()} if sys.argv[1] == "cpu" else {}  # before there are threads
    print(json.dumps({**measured, **measure(torch.device(sys.argv[1]))}))
