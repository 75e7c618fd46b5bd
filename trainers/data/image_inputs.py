"""Named arrays that a model takes of its images: kept as bytes, scaled, joined to those of a batch.

N images of a set, I of a batch; C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.errors import RequestError
from trainers.data.dataset import Dataset

if TYPE_CHECKING:
    from torch import Tensor


def scale_pixels(
    pixels_NCHW: np.ndarray, factor: np.ndarray | float, mean_C: np.ndarray, std_C: np.ndarray
) -> np.ndarray:
    """Return the values that a model takes of 8-bit pixels, in fp32."""
    scaled = pixels_NCHW.astype(np.float32) * np.float32(factor)
    values: np.ndarray = (scaled - mean_C[:, None, None]) / std_C[:, None, None]
    return values


def joined(images: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join each array of several images along the first axis in which its shapes differ, the first where none does.

    Raises RequestError where shapes differ in several axes.
    """
    found: dict[str, np.ndarray] = {}
    for name in images[0]:
        arrays = [image[name] for image in images]
        differs = [axis for axis in range(arrays[0].ndim) if len({array.shape[axis] for array in arrays}) > 1]
        if len(differs) > 1:
            shapes = ", ".join(sorted({"x".join(map(str, array.shape)) for array in arrays}))
            raise RequestError(f"{name} of several images cannot be joined: {shapes}; bring images to one size")
        found[name] = np.concatenate(arrays, axis=differs[0] if differs else 0)
    return found


def packed_bytes(arrays: Mapping[str, np.ndarray], precision: str) -> bytes:
    """Return an image's arrays as safetensors: fractions in a precision, whole numbers that fit in 8 bits."""
    import torch
    from safetensors.torch import save

    from trainers.runtime.precision import dtype_of

    dtype = dtype_of(precision)
    tensors = {name: torch.from_numpy(_small(array)) for name, array in arrays.items()}
    return bytes(
        save({name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()})
    )


def _small(array: np.ndarray) -> np.ndarray:
    fits = array.dtype.kind in "iub" and array.size > 0 and array.min() >= 0 and array.max() < 256
    return np.ascontiguousarray(array.astype(np.uint8) if fits else array)


def _unpacked(content: np.ndarray) -> dict[str, np.ndarray]:
    from safetensors.torch import load

    return {
        name: (value.float() if value.is_floating_point() else value.long()).numpy()
        for name, value in load(content.tobytes()).items()
    }


def image_inputs(dataset: Dataset, numbers: Sequence[int] | np.ndarray) -> "dict[str, Tensor]":
    """Return what a model takes of a set's images by their numbers, one at least, by the names of its arguments."""
    import torch

    arrays = dataset.arrays
    if "images" in arrays:
        factor = float(arrays["pixel_factor"][0])
        pixels = scale_pixels(arrays["images"][numbers], factor, arrays["pixel_mean"], arrays["pixel_std"])
        return {"pixel_values": torch.from_numpy(pixels)}
    opened = [_unpacked(np.asarray(dataset.cut("image_bytes", number))) for number in numbers]
    return {name: torch.from_numpy(value) for name, value in joined(opened).items()}


def image_token_counts(dataset: Dataset, image_id: int) -> np.ndarray:
    """Return how many image tokens each image of a set has."""
    arrays = dataset.arrays
    if "image_tokens" in arrays:
        return np.asarray(arrays["image_tokens"])
    shown: Any = arrays["image_numbers"]
    each = int((np.asarray(arrays["input_ids"]) == image_id).sum()) // max(len(shown), 1)
    return np.full(len(arrays["images"]), each, dtype=np.int64)
