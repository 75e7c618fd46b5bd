"""Images with their labels and captions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from trainers.data.dataset import NO_LABEL, Contents, Dataset, Fate
from trainers.data.images import DecodedImage, Label, OneShape


@dataclass(frozen=True)
class Images:
    """images [N, C, H, W] of 8 bits, labels [N]: places in the set's classes, -1 without labels; captions.

    Once a text encoder has read the captions, caption_ids [S] with caption_offsets [N + 1].
    """

    name: ClassVar[str] = "images"
    version: ClassVar[int] = 2
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["images"]] = "images"
    text: ClassVar[None] = None

    def identity(self) -> dict[str, Any]:
        """What the source says is all."""
        return {"form": "images"}

    def encode(self, rows: Iterable[DecodedImage]) -> Iterator[DecodedImage]:
        """Demand one size and number of channels; raises SourceError naming two images that differ."""
        one_shape = OneShape()
        return (one_shape.require(row) for row in rows)

    def arrays(self, encoded: Iterable[DecodedImage], fate: Fate) -> Contents:
        """Stack all of them; holds the set in memory twice."""
        rows = list(encoded)
        if not rows:
            return Contents({}, [], {}, learns_nothing=True)
        classes, labels = number_labels([row.label for row in rows])
        captions = [row.caption for row in rows if row.caption is not None]
        images = np.ascontiguousarray(np.stack([row.pixels_HWC for row in rows]).transpose(0, 3, 1, 2))
        _, channels, height, width = images.shape
        counts = {"classes": len(classes), "captions": len(set(captions))}
        return Contents(
            arrays={"images": images, "labels": labels},
            row_ids=[row.id for row in rows],
            holds={"channels": channels, "height": height, "width": width, **counts},
            learns_nothing=False,
            classes=classes,
            captions=captions,
        )

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return an `ImageBatch` as evaluations take it; fillers have the pixels of row 0."""
        import torch

        from trainers.data.batches import ImageBatch, pad_texts, sample_ids
        from trainers.runtime.randomness import stream_seeds

        taken = np.maximum(np.asarray(rows, dtype=np.int64), 0)
        captions = [dataset.cut("caption_ids", row) for row in taken] if "caption_ids" in dataset.arrays else None
        return ImageBatch(
            images_BCHW=torch.from_numpy(scaled(dataset.arrays["images"][taken])),
            labels_B=torch.from_numpy(dataset.arrays["labels"][taken]),
            noise_seeds_B=torch.tensor(stream_seeds(0, "evaluation", rows), dtype=torch.int64),
            sample_ids_B=sample_ids(rows),
            captions=None if captions is None else pad_texts(captions, dataset.pad_id),
        )


def scaled(images_NCHW: np.ndarray) -> np.ndarray:
    """Return 8-bit pixels as values in [0, 1]."""
    return np.asarray(images_NCHW, dtype=np.float32) / 255


def number_labels(labels: Sequence[Label]) -> tuple[list[str], np.ndarray]:
    """Return the classes, whole numbers by size and texts by the alphabet, and each label's place in them."""
    found = set(labels)
    if found == {None}:
        return [], np.full(len(labels), NO_LABEL, dtype=np.int64)
    ordered = sorted(
        found, key=lambda label: (isinstance(label, str), label if isinstance(label, int) else 0, str(label))
    )
    places = {label: place for place, label in enumerate(ordered)}
    return [str(label) for label in ordered], np.array([places[label] for label in labels], dtype=np.int64)
