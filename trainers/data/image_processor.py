"""How a vision-language model takes its images: by the image processor and the token rule of its own folder.

C channels, H height, W width of the pixel values.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import RequestError
from recipes.models.vision_language import PROCESSOR_FILES
from trainers.data.images import open_image


@dataclass(frozen=True)
class ImageProcessor:
    """transformers' processor on Pillow; pixels are kept in 8 bits, resized and cropped, and scaled at their use.

    A pixel's value in the model is (pixel * factor - mean_C) / std_C, as the processor computes it.
    """

    digest: str
    """64 hex digits over the processor's files."""
    image_token: str
    image_id: int
    tokens_per_image: int
    """Image tokens that the processor writes for one image."""
    shape_CHW: tuple[int, int, int]
    factor: float
    mean_C: np.ndarray
    std_C: np.ndarray
    files: dict[str, bytes]
    """The processor's files, for the artifacts of models that take their images this way."""
    _inner: Any

    def pixels(self, data: bytes, place: str) -> np.ndarray:
        """Decode an image and bring it to the model's size [C, H, W]; raises RequestError naming the place."""
        pixels = _processed(self._inner.image_processor, open_image(data, place))
        if pixels.shape != self.shape_CHW:
            found, wanted = ("x".join(map(str, shape)) for shape in (pixels.shape, self.shape_CHW))
            raise RequestError(
                f"{place}: the processor makes {found} of this image and {wanted} of others; only processors that "
                "bring every image to one size are supported (set do_center_crop, or size with height and width)"
            )
        return pixels


def scale_pixels(
    pixels_NCHW: np.ndarray, factor: np.ndarray | float, mean_C: np.ndarray, std_C: np.ndarray
) -> np.ndarray:
    """Return the values that a model takes of 8-bit pixels, in fp32."""
    scaled = pixels_NCHW.astype(np.float32) * np.float32(factor)
    values: np.ndarray = (scaled - mean_C[:, None, None]) / std_C[:, None, None]
    return values


def load_image_processor(folder: Path) -> ImageProcessor:
    """Open the processor of a model folder with its stock class; raises RequestError where it cannot serve."""
    from transformers import AutoProcessor

    files = {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}
    try:
        inner = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
        images = inner.image_processor
        token, number = inner.image_token, inner.image_token_id
    except (OSError, ValueError, AttributeError, KeyError, ImportError) as error:
        raise RequestError(f"{folder}: its processor cannot be opened: {str(error).splitlines()[0]}") from None
    from PIL import Image

    sample = Image.fromarray(np.full((48, 64, 3), 127, dtype=np.uint8))
    written = inner(images=sample, text=token, add_special_tokens=False)["input_ids"][0]
    channels, height, width = _processed(images, sample).shape
    is_normalised = bool(images.do_normalize)
    mean = images.image_mean if is_normalised else 0.0
    std = images.image_std if is_normalised else 1.0
    return ImageProcessor(
        digest=hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest(),
        image_token=token,
        image_id=int(number),
        tokens_per_image=sum(int(found) == number for found in np.asarray(written).ravel()),
        shape_CHW=(channels, height, width),
        factor=float(images.rescale_factor) if images.do_rescale else 1.0,
        mean_C=np.broadcast_to(np.asarray(mean, dtype=np.float32), (channels,)).copy(),
        std_C=np.broadcast_to(np.asarray(std, dtype=np.float32), (channels,)).copy(),
        files=files,
        _inner=inner,
    )


def _processed(images: Any, image: Any) -> np.ndarray:
    """Run an image processor up to the scaling of pixels."""
    found = images(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    pixels = np.asarray(found[0])
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise RequestError(
            f"the image processor {type(images).__name__} gives {pixels.dtype} of shape {pixels.shape}; only those "
            "that give one image of 8-bit pixels are supported"
        )
    return pixels
