"""Encoders and decoders of images: fully connected, or convolutions that halve and double the size.

No norm looks at a whole batch, so no output depends on ranks or micro-batches.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

NetworkType = Literal["mlp", "convnet"]
NORM_GROUPS = 8


def sizes_of(height: int, width: int, depth: int) -> list[tuple[int, int]]:
    """Return height and width at each level, the image's own first; odd sizes are rounded up."""
    sizes = [(height, width)]
    for _ in range(depth):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def build_encoder(kind: NetworkType, shape: tuple[int, int, int], width: int, depth: int, outputs: int) -> nn.Module:
    """Build a network from images [B, C, H, W] to vectors [B, outputs]."""
    channels, height, wide = shape
    layers: list[nn.Module] = []
    match kind:
        case "mlp":
            layers.append(nn.Flatten())
            size = channels * height * wide
            for _ in range(depth):
                layers += [nn.Linear(size, width), nn.SiLU()]
                size = width
        case "convnet":
            for level in range(depth):
                layers += [
                    nn.Conv2d(channels, width << level, 3, stride=2, padding=1),
                    _norm(width << level),
                    nn.SiLU(),
                ]
                channels = width << level
            last = sizes_of(height, wide, depth)[-1]
            layers.append(nn.Flatten())
            size = channels * last[0] * last[1]
    return nn.Sequential(*layers, nn.Linear(size, outputs))


def build_decoder(kind: NetworkType, shape: tuple[int, int, int], width: int, depth: int, inputs: int) -> nn.Module:
    """Build a network from vectors [B, inputs] to images' raw values [B, C, H, W]."""
    channels, height, wide = shape
    layers: list[nn.Module] = []
    match kind:
        case "mlp":
            size = inputs
            for _ in range(depth):
                layers += [nn.Linear(size, width), nn.SiLU()]
                size = width
            layers += [nn.Linear(size, channels * height * wide), nn.Unflatten(1, shape)]
        case "convnet":
            sizes = sizes_of(height, wide, depth)
            inner = width << (depth - 1)
            layers += [nn.Linear(inputs, inner * sizes[-1][0] * sizes[-1][1]), nn.Unflatten(1, (inner, *sizes[-1]))]
            for level in reversed(range(depth)):
                outer = width << max(level - 1, 0)
                layers += [Resize(sizes[level]), nn.Conv2d(inner, outer, 3, padding=1), _norm(outer), nn.SiLU()]
                inner = outer
            layers.append(nn.Conv2d(inner, channels, 3, padding=1))
    return nn.Sequential(*layers)


class Resize(nn.Module):
    """Nearest-neighbour resize to a fixed size."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return [B, C, *size]."""
        return functional.interpolate(x_BCHW, size=self.size, mode="nearest")


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(count for count in range(min(NORM_GROUPS, channels), 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)
