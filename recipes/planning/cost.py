"""What a stage computes, and how long that takes: operations by formula, time from a machine's rates (pure).

A token of a forward pass takes 2 N operations for the N parameters that it is multiplied by, 4 L T d for attention of
L layers and heads of d together to T tokens, and 2 V D where its logits are taken. A backward pass takes twice a
forward one (6 N, 12 L T d), with adapters on a frozen model once (4 N; attention has no weights to save on), and
recomputed activations take one more. That is what PaLM (Chowdhery et al. 2022, appendix B) and Kaplan et al. (2020)
count: whole squares of attention, every sequence at its longest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from recipes.models.base import Shape
from recipes.models.images.tally import Tally
from recipes.models.known_models import Sized
from recipes.planning.gpus import Gpu
from recipes.planning.memory import MOMENT_BYTES, Sizes
from recipes.stages.answers import Pass
from recipes.stages.base import StageBase, TextStage
from recipes.stages.sharding import FP32_BYTES, Shard

UTILISATION = 0.4
"""Share of a GPU's peak that training is taken to reach where nothing was measured: 33 to 48 % is what public stacks
report in bf16 on H100s for models of 1B parameters and more; small ones reach less."""
BANDWIDTH_SHARE = 0.6
"""Share of the memory's bandwidth that writing answers is taken to reach; 69 % is gpt-fast's on an A100."""
LAYER_S = 75e-6
"""Seconds that a layer's kernels take to be called for one more token: about fifteen, of five microseconds."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one worker gets done."""

    flops_per_s: Mapping[str, Sequence[tuple[int, float]]]
    """Operations of training, by precision: models' widths in rising order, and what is reached at each."""
    bytes_per_s: float
    """Read from memory."""
    source: str
    """Where these come from, in words."""
    adapter_flops_per_s: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """The same of adapters on frozen models, whose small products are slow; of a precision that is missing the same."""
    image_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """Operations of convolutions, by precision; of one that is missing those of the widest model."""
    writing_flops_per_s: float | None = None
    """Operations of tokens that are written one after the other; None: those of training."""
    layer_s: float = 0.0
    """Seconds of a layer for one more token, however little there is to compute: what calling kernels costs."""

    def training(self, precision: str, width: int | None, *, is_adapted: bool = False) -> float:
        """Operations a second for models of a width, interpolated by its logarithm; None: of images."""
        known = self.flops_per_s["bf16" if precision == "bf16" else "fp32"]
        known = self.adapter_flops_per_s.get(precision, known) if is_adapted else known
        if width is None:
            return self.image_flops_per_s.get(precision, known[-1][1])
        for (narrow, slower), (wide, faster) in pairwise(known):
            if narrow <= width <= wide:
                return float(slower + (faster - slower) * math.log(width / narrow) / math.log(wide / narrow))
        return known[0][1] if width < known[0][0] else known[-1][1]


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a whole stage, of all workers together."""

    training: int = 0
    scoring: int = 0
    """Forward passes alone."""
    writing: int = 0
    """Answers, or images that are drawn."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.training + self.scoring + self.writing


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage takes."""

    flops: Flops
    seconds: float | None = None
    """Of its arithmetic: starting workers, reading data and saving come on top. None: no rates are known."""
    price: float | None = None
    """In the currency of the recipe's price."""


def stated_rates(gpu: Gpu, utilisation: float) -> Rates:
    """The rates of a GPU by its data sheet."""
    peaks = {precision: gpu.flops_per_s(precision) for precision in ("fp32", "bf16")}
    said = ", ".join(f"{precision} {peak / 1e12:,.0f} TFLOP/s" for precision, peak in peaks.items())
    return Rates(
        {precision: [(1, utilisation * peak)] for precision, peak in peaks.items()},
        BANDWIDTH_SHARE * gpu.terabytes_per_s * 1e12,
        f"{utilisation:.0%} of {gpu.name}'s peak ({said}), {BANDWIDTH_SHARE:.0%} of {gpu.terabytes_per_s:g} TB/s",
        layer_s=LAYER_S,
    )


def text_flops(stage: TextStage, architecture: Sized, vocab_size: int, steps: int) -> Flops:
    """Operations of a stage of language models; its further models are taken to have the size of its own."""
    training = scoring = writing = 0
    for passed in stage.passes(steps):
        flops = _text_pass(stage, architecture, vocab_size, passed)
        if passed.trains:
            training += flops
        elif passed.writes:
            writing += flops
        else:
            scoring += flops
    return Flops(training, scoring, writing)


def _text_pass(stage: TextStage, architecture: Sized, vocab_size: int, passed: Pass) -> int:
    """Operations of one kind of pass over the whole stage."""
    parameters, lora = architecture.multiplied_parameters(), stage.adapters
    body, attention = 2 * parameters, architecture.attention_flops(passed.length)
    head = 2 * passed.logits * vocab_size * architecture.shape().width
    again = 1 if stage.shard.gradient_checkpointing else 0
    if not passed.trains:
        token = body + attention
    elif lora is None:
        token, head = (3 + again) * (body + attention), 3 * head
    else:
        adapter = 2 * lora.num_parameters(architecture.linears())
        token = (2 + again) * body + (3 + again) * (attention + adapter)
        head *= 2
    return int(passed.samples * passed.times * (passed.length * token + head))


def image_flops(stage: StageBase, net: Tally, passes: list[Pass]) -> Flops:
    """Operations of a stage of images, by those of its network for one image."""
    training = scoring = writing = 0
    factor = 3 if stage.adapters is None else 2
    for passed in passes:
        flops = int(passed.samples * passed.times * net.flops)
        if passed.trains:
            training += factor * flops
        elif passed.writes:
            writing += flops * passed.writes
        else:
            scoring += flops
    return Flops(training, scoring, writing)


def stage_seconds(
    flops: Flops,
    shard: Shard,
    sizes: Sizes,
    workers: int,
    rates: Rates,
    steps: int,
    passes: list[Pass],
    shape: Shape | None,
    *,
    is_adapted: bool = False,
) -> float:
    """The time of a stage's arithmetic: starting workers, reading data and saving come on top.

    Operations at the workers' rate; answers at the rate of the memory where that is slower, since every token reads the
    whole model, and what calling its layers costs; the optimiser reads and writes its state once a step. `shape` is
    that of a language model; None: images.
    """
    width = None if shape is None else shape.width
    speed = workers * rates.training(shard.precision, width)
    computing = flops.scoring / speed
    computing += flops.training / (workers * rates.training(shard.precision, width, is_adapted=is_adapted))
    tokens = sum(passed.times * passed.writes for passed in passes)
    model_bytes = (sizes.parameters * shard.value_bytes) + sizes.memory.cache / 2
    written = speed if rates.writing_flops_per_s is None else workers * rates.writing_flops_per_s
    writing = max(flops.writing / written, tokens * model_bytes / rates.bytes_per_s)
    writing += 0 if shape is None else tokens * shape.layers * rates.layer_s
    state = sizes.trainable_parameters * (2 * (FP32_BYTES + MOMENT_BYTES) + FP32_BYTES)
    updating = steps * state / (workers if shard.zero_stage else 1) / rates.bytes_per_s
    return computing + writing + updating
