"""Counts an image model's networks layer by layer: parameters exactly, and what layers keep for the backward (pure).

A contract test compares the parameters with the built networks and the kept values with what torch keeps.
"""

from dataclasses import dataclass, field

from recipes.data.images import ImageSetFacts
from recipes.models.base import Linear

CAPTION_TOKENS = 32
"""Tokens of a caption that memory is predicted with."""
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear modules of a diffusion's attention, which adapters go on."""


@dataclass(frozen=True)
class TextSizes:
    """A text encoder as the diffusion that it conditions sees it."""

    width: int
    parameters: int
    """Of the whole language model: its files are taken over as they are."""


@dataclass
class Tally:
    """Counts a network layer by layer."""

    parameters: int = 0
    kept: int = field(default=0)
    """Values for each sample that layers keep for the backward pass: their inputs."""
    largest: int = 0
    """Values of a sample that the largest layer reads."""
    flops: int = 0
    """Operations of a sample's forward pass: two for each product of a value with a weight, or of two values."""
    projections: list[Linear] = field(default_factory=list)
    """The attention's linear modules."""

    def linear(self, inputs: int, outputs: int, *, positions: int = 1, has_bias: bool = True) -> None:
        """Count a fully connected layer."""
        self.parameters += inputs * outputs + outputs * has_bias
        self._read(inputs * positions)
        self.flops += 2 * inputs * outputs * positions

    def _read(self, values: int) -> None:
        """Count the inputs of a layer."""
        self.kept += values
        self.largest = max(self.largest, values)

    def conv(self, inputs: int, outputs: int, area: int, size: int = 3, *, drawn: int | None = None) -> None:
        """Count a convolution over inputs of `area` pixels; of `drawn` pixels where it halves or doubles the size."""
        self.parameters += size * size * inputs * outputs + outputs
        self._read(inputs * area)
        self.flops += 2 * size * size * inputs * outputs * (area if drawn is None else drawn)

    def norm(self, channels: int, area: int) -> None:
        """Count a group norm and the activation after it."""
        self.parameters += 2 * channels
        self.kept += 2 * channels * area

    def activation(self, values: int) -> None:
        """Count an activation."""
        self.kept += values

    def residual(self, inputs: int, outputs: int, area: int, embedding: int = 0) -> None:
        """Count diffusers' ResnetBlock2D; `embedding` is the width of the time embedding, 0 for none."""
        self.norm(inputs, area)
        self.conv(inputs, outputs, area)
        if embedding:
            self.linear(embedding, outputs)
        self.norm(outputs, area)
        self.conv(outputs, outputs, area)
        if inputs != outputs:
            self.conv(inputs, outputs, area, size=1)

    def attention(self, channels: int, area: int, heads: int) -> None:
        """Count self-attention over pixels."""
        self.norm(channels, area)
        for name in PROJECTIONS:
            self.linear(channels, channels, positions=area)
            self.projections.append(Linear(name, channels, channels))
        self.kept += 3 * channels * area + 2 * heads * area * area
        self.flops += 4 * channels * area * area

    def transformer(self, channels: int, area: int, heads: int, text_width: int) -> None:
        """Count diffusers' Transformer2DModel: attention over pixels, over the caption, a gated feed-forward."""
        self.norm(channels, area)
        self.conv(channels, channels, area, size=1)
        for keys, positions, stretch in ((channels, area, area), (text_width, CAPTION_TOKENS, CAPTION_TOKENS)):
            self.norm(channels, area)
            for name in PROJECTIONS:
                inputs = keys if name in ("to_k", "to_v") else channels
                self.linear(
                    inputs, channels, positions=area if inputs == channels else positions, has_bias=name == "to_out.0"
                )
                self.projections.append(Linear(name, inputs, channels))
            self.kept += channels * (area + 2 * stretch) + 2 * heads * area * stretch
            self.flops += 4 * channels * area * stretch
        self.norm(channels, area)
        self.linear(channels, 8 * channels, positions=area)
        self.activation(12 * channels * area)
        self.linear(4 * channels, channels, positions=area)
        self.conv(channels, channels, area, size=1)


def _sizes(facts: ImageSetFacts, depth: int) -> list[tuple[int, int]]:
    """Height and width at each level; odd sizes are rounded up."""
    sizes = [(facts.height, facts.width)]
    for _ in range(depth):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def count_encoder(net: Tally, kind: str, facts: ImageSetFacts, width: int, depth: int, outputs: int) -> None:
    """Count the encoder that families share, from an image to so many outputs."""
    sizes = _sizes(facts, depth)
    size, channels = facts.channels * facts.height * facts.width, facts.channels
    for level in range(depth):
        if kind == "mlp":
            net.linear(size, width)
            net.activation(width)
            size = width
            continue
        outer, (height, wide) = width << level, sizes[level + 1]
        net.conv(channels, outer, sizes[level][0] * sizes[level][1], drawn=height * wide)
        net.norm(outer, height * wide)
        channels, size = outer, outer * height * wide
    net.linear(size, outputs)
    net.activation(outputs)


def count_decoder(net: Tally, kind: str, facts: ImageSetFacts, width: int, depth: int, inputs: int) -> None:
    """Count the decoder that families share, from so many inputs to an image."""
    sizes = _sizes(facts, depth)
    if kind == "mlp":
        for _ in range(depth):
            net.linear(inputs, width)
            net.activation(width)
            inputs = width
        net.linear(inputs, facts.channels * facts.height * facts.width)
        return
    inner = width << (depth - 1)
    net.linear(inputs, inner * sizes[-1][0] * sizes[-1][1])
    for level in reversed(range(depth)):
        outer, area = width << max(level - 1, 0), sizes[level][0] * sizes[level][1]
        net.conv(inner, outer, area)
        net.norm(outer, area)
        inner = outer
    net.conv(inner, facts.channels, facts.height * facts.width)
