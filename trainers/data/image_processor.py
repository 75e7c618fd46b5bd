"""How a vision-language model takes its images: by the processor in its folder.

C channels, H height, W width of the pixel values. P images.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recipes.errors import RequestError
from recipes.models.vision_language import PROCESSOR_FILES, VisionFacts, read_processor_class
from trainers.data.dataset import Chunks
from trainers.data.image_inputs import joined, packed_bytes, scale_pixels
from trainers.data.images import open_image
from trainers.data.layouts.arrays import offsets
from trainers.data.row_images import RowImage


class ImageTokens(Protocol):
    """What tokenizing a row with images takes, and laying it out."""

    @property
    def digest(self) -> str:
        """64 hex digits over what decides tokens and values."""

    @property
    def image_token(self) -> str:
        """The token that marks an image's place in a text."""

    @property
    def image_id(self) -> int:
        """Its number, and that of every token that an image's features are put in the place of."""

    def token_ids(self, image: RowImage) -> np.ndarray:
        """Return the tokens that an image's place becomes; raises RequestError naming the image."""

    def stored(self, images: Mapping[str, RowImage]) -> dict[str, np.ndarray | Chunks]:
        """Return the arrays of a set that hold these images, each once."""


@dataclass(frozen=True)
class FixedSize:
    """Of a processor that brings every image to one size: pixels are kept in 8 bits, and scaled at their use.

    A pixel's value in the model is (pixel * factor - mean_C) / std_C, as the processor computes it.
    """

    tokens: int
    """Of an image."""
    shape_CHW: tuple[int, int, int]
    factor: float
    mean_C: np.ndarray
    std_C: np.ndarray


@dataclass(frozen=True)
class Seen:
    """An image as its processor puts it to the model."""

    ids: np.ndarray
    """The tokens of its place."""
    arrays: dict[str, np.ndarray]
    """By the names of the model's arguments."""


@dataclass(frozen=True)
class ImageProcessor:
    """transformers' processor on Pillow: one image at a time becomes the tokens of its place and named arrays."""

    digest: str
    """64 hex digits over the processor's files."""
    image_token: str
    image_id: int
    fixed: FixedSize | None
    """None: the number of tokens, and the arrays' shapes, depend on the image."""
    files: dict[str, bytes]
    """The processor's files, for the artifacts of models that take their images this way."""
    _inner: Any
    precision: str = "fp32"
    """Of the values that are kept, where they are not pixels."""
    _known: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict, compare=False)
    """Tokens and stored bytes of images, by digest."""

    def kept_in(self, precision: str) -> "ImageProcessor":
        """Return the processor of sets whose values have the precision that the model takes them in."""
        if self.fixed is not None or precision == self.precision:
            return self
        digest = hashlib.sha256(f"{self.digest} {precision}".encode()).hexdigest()
        return replace(self, digest=digest, precision=precision, _known={})

    @property
    def tokens_per_image(self) -> int | None:
        """Image tokens of any image; None: they depend on its size."""
        return None if self.fixed is None else self.fixed.tokens

    def token_ids(self, image: RowImage) -> np.ndarray:
        """Return the tokens that an image's place becomes; raises RequestError naming the image."""
        if self.fixed is not None:
            return np.full(self.fixed.tokens, self.image_id, dtype=np.int32)
        if image.digest not in self._known:
            seen = self.see(image.read(), image.name)
            self._known[image.digest] = (seen.ids, len(packed_bytes(seen.arrays, self.precision)))
        return self._known[image.digest][0]

    def stored(self, images: Mapping[str, RowImage]) -> dict[str, np.ndarray | Chunks]:
        """Return the images' values, made while they are stored: of one size as 8-bit pixels, else each as bytes."""
        if self.fixed is not None:
            shape = (len(images), *self.fixed.shape_CHW)
            pixels = (np.ascontiguousarray(self.pixels(image.read(), image.name)) for image in images.values())
            return {
                "images": Chunks(np.dtype(np.uint8), shape, (image.tobytes() for image in pixels)),
                "pixel_factor": np.asarray([self.fixed.factor], dtype=np.float64),
                "pixel_mean": self.fixed.mean_C,
                "pixel_std": self.fixed.std_C,
            }
        tokens = [int((self.token_ids(image) == self.image_id).sum()) for image in images.values()]
        sizes = [self._known[digest][1] for digest in images]
        return {
            "image_bytes": Chunks(np.dtype(np.uint8), (sum(sizes),), self._bytes(images.values())),
            "image_bytes_offsets": offsets(sizes),
            "image_tokens": np.asarray(tokens, dtype=np.int64),
        }

    def _bytes(self, images: Any) -> Iterator[bytes]:
        for image in images:
            yield packed_bytes(self.see(image.read(), image.name).arrays, self.precision)

    def inputs(self, images: Sequence[RowImage]) -> dict[str, np.ndarray]:
        """Return what the model takes of images, in their order, by the names of its arguments."""
        return joined([self.see(image.read(), image.name).arrays for image in images])

    def see(self, data: bytes, place: str) -> Seen:
        """Put an encoded image to the processor; raises RequestError naming the place."""
        if self.fixed is not None:
            pixels = self.pixels(data, place)
            values = scale_pixels(pixels[None], self.fixed.factor, self.fixed.mean_C, self.fixed.std_C)
            return Seen(np.full(self.fixed.tokens, self.image_id, dtype=np.int32), {"pixel_values": values})
        try:
            return self._see(open_image(data, place))
        except (ValueError, TypeError, IndexError) as error:
            raise RequestError(f"{place}: the processor does not take this image: {error}") from None

    def _see(self, image: Any) -> Seen:
        written = self._inner(images=[image], text=[self.image_token], add_special_tokens=False)
        names = self._inner.image_processor.model_input_names
        arrays = {name: np.ascontiguousarray(written[name]) for name in names if name in written}
        return Seen(np.asarray(written["input_ids"][0], dtype=np.int32), arrays)

    @cached_property
    def sample(self) -> Seen:
        """A fixed pattern, which a model's outputs are compared on."""
        if self.fixed is None:
            return self._see(_sample())
        channels, height, width = self.fixed.shape_CHW
        pattern = np.sin(np.arange(channels * height * width) * 0.37).astype(np.float32)
        ids = np.full(self.fixed.tokens, self.image_id, dtype=np.int32)
        return Seen(ids, {"pixel_values": pattern.reshape(1, channels, height, width)})

    def pixels(self, data: bytes, place: str) -> np.ndarray:
        """Decode an image and bring it to the model's size [C, H, W]; raises RequestError naming the place."""
        assert self.fixed is not None
        pixels = _resized(self._inner.image_processor, open_image(data, place))
        shape = None if pixels is None else pixels.shape
        if pixels is None or shape != self.fixed.shape_CHW:
            found, wanted = ("x".join(map(str, shape or ())) for shape in (shape, self.fixed.shape_CHW))
            raise RequestError(
                f"{place}: the processor makes {found} of this image and {wanted} of others; only processors that "
                "bring every image to one size are supported (set do_center_crop, or size with height and width)"
            )
        return pixels


@dataclass(frozen=True)
class CountedImages:
    """A processor as far as its files say, without torch: how many tokens an image takes, and no values."""

    facts: VisionFacts
    image_id: int
    digest: str = ""

    @property
    def image_token(self) -> str:
        """The token that marks an image's place in a text."""
        return self.facts.image_token

    def token_ids(self, image: RowImage) -> np.ndarray:
        """Return as many tokens as an image takes, one where only the processor itself knows."""
        width, height = open_image(image.read(), image.name).size
        return np.full(self.facts.tokens(height, width) or 1, self.image_id, dtype=np.int32)

    def stored(self, images: Mapping[str, RowImage]) -> dict[str, np.ndarray | Chunks]:
        """Return nothing: rows are counted, not stored."""
        return {}


def load_image_processor(folder: Path) -> ImageProcessor:
    """Open the processor of a model folder with its stock class; raises RequestError where it cannot serve."""
    files = {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}
    try:
        inner = open_processor(folder)
        images = inner.image_processor
        token, number = inner.image_token, inner.image_token_id
    except (OSError, ValueError, AttributeError, KeyError, TypeError, ImportError) as error:
        raise RequestError(f"{folder}: its processor cannot be opened: {str(error).splitlines()[0]}") from None
    return ImageProcessor(
        digest=hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest(),
        image_token=token,
        image_id=int(number),
        fixed=_fixed_size(inner, images, token, int(number)),
        files=files,
        _inner=inner,
    )


def open_processor(folder: Path) -> Any:
    """Return transformers' processor of a folder on Pillow, for images and text alone.

    Its part for videos, which needs torchvision, is not opened.
    """
    import transformers

    named = getattr(transformers, read_processor_class(folder), None)
    is_processor = isinstance(named, type) and issubclass(named, transformers.ProcessorMixin)
    processor_class: Any = named if is_processor else transformers.AutoProcessor
    parts = processor_class.get_attributes() if is_processor else []
    if "video_processor" in parts:
        kept = [part for part in parts if part != "video_processor"]
        without = {"get_attributes": classmethod(lambda cls: kept)}
        processor_class = type(processor_class.__name__, (processor_class,), without)
    return processor_class.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def _sample() -> Any:
    from PIL import Image

    rows, columns = np.mgrid[:48, :64]
    pattern = 127 + 120 * np.sin(0.37 * (64 * rows + columns)[..., None] + np.arange(3))
    return Image.fromarray(pattern.astype(np.uint8))


def _fixed_size(inner: Any, images: Any, token: str, number: int) -> FixedSize | None:
    """Return how every image is brought to one size; None where it is not so, or is not said in pixels alone."""
    pixels = _resized(images, _sample())
    if pixels is None or list(images.model_input_names) != ["pixel_values"]:
        return None
    written = np.asarray(inner(images=_sample(), text=token, add_special_tokens=False)["input_ids"][0]).ravel()
    if (written != number).any():
        return None
    channels, height, width = pixels.shape
    is_normalised = bool(images.do_normalize)
    mean, std = (images.image_mean, images.image_std) if is_normalised else (0.0, 1.0)
    return FixedSize(
        tokens=len(written),
        shape_CHW=(channels, height, width),
        factor=float(images.rescale_factor) if images.do_rescale else 1.0,
        mean_C=np.broadcast_to(np.asarray(mean, dtype=np.float32), (channels,)).copy(),
        std_C=np.broadcast_to(np.asarray(std, dtype=np.float32), (channels,)).copy(),
    )


def _resized(images: Any, image: Any) -> np.ndarray | None:
    """Run an image processor up to the scaling of pixels; None where that is not one image of 8-bit pixels."""
    found = images(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    pixels = np.asarray(found[0])
    return pixels if pixels.dtype == np.uint8 and pixels.ndim == 3 else None
