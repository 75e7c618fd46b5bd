"""Images as files: grids as PNG."""

import base64
import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BORDER = 1
MIN_SIDE = 24
"""Smaller images are enlarged by a whole factor to at least this many pixels."""


def encode_grid(images_NCHW: Tensor, columns: int | None = None) -> bytes:
    """Return a PNG with images of values in [0, 1] in rows; without `columns` about as many as rows."""
    from PIL import Image

    array = grid_array(images_NCHW, columns)
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def grid_sample(images_NCHW: Tensor, columns: int | None, step: int) -> dict[str, Any]:
    """Return the grid of a step as a run keeps samples, for its report."""
    data = base64.b64encode(encode_grid(images_NCHW, columns)).decode()
    return {"step": step, "image": f"data:image/png;base64,{data}", "caption": f"step {step}"}


def grid_array(images_NCHW: Tensor, columns: int | None = None) -> np.ndarray:
    """Return the grid's pixels [H, W, C] of 8 bits."""
    count, channels, height, width = images_NCHW.shape
    factor = max(1, math.ceil(MIN_SIDE / max(height, width)))
    pixels = to_pixels(images_NCHW).repeat_interleave(factor, 2).repeat_interleave(factor, 3).numpy()
    height, width = height * factor, width * factor
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + BORDER) + BORDER, columns * (width + BORDER) + BORDER, channels), 96, np.uint8)
    for number, image in enumerate(pixels):
        top = BORDER + number // columns * (height + BORDER)
        left = BORDER + number % columns * (width + BORDER)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid


def to_pixels(images: Tensor) -> Tensor:
    """Return values in [0, 1] as 8 bits."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
