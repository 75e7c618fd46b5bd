"""Turns images into an indexed, memory-mapped set that is built once and kept in the store under its digest."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.images import ImageSource
from recipes.errors import RequestError
from recipes.planning.fingerprint import LOCATION_KEYS
from trainers.data.images import DecodedImage, Label, OneShape, read_images
from trainers.data.materialise import find_set
from trainers.data.sources.open import open_source
from trainers.store.manifest import DatasetManifest, FileEntry, canonical_json
from trainers.store.store import Store

FORMAT = 2
"""Raised when the same request gives other arrays."""
NO_LABEL = -1


@dataclass(frozen=True)
class ImageReport:
    """What a set holds."""

    rows_in: int
    channels: int
    height: int
    width: int
    classes: int
    """Different labels; 0 without labels."""
    captions: int = 0
    """Different captions; 0 without captions."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CaptionTokens:
    """The captions of a set's images as one tokenizer reads them."""

    ids: np.ndarray
    """int32, all captions one after the other."""
    offsets: np.ndarray
    """int64 [N + 1]: where each caption starts and ends."""
    pad_id: int

    @classmethod
    def of(cls, captions: Sequence[Sequence[int]], pad_id: int) -> "CaptionTokens":
        """Join tokenized captions."""
        offsets = np.cumsum([0, *(len(ids) for ids in captions)], dtype=np.int64)
        return cls(np.array([token for ids in captions for token in ids], dtype=np.int32), offsets, pad_id)

    def row(self, row: int) -> np.ndarray:
        """Return the tokens of an image's caption."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class ImageDataset:
    """A materialised set of images; the arrays are read-only and memory-mapped."""

    digest: str
    report: ImageReport
    images_NCHW: np.ndarray
    """8 bits a value."""
    labels_N: np.ndarray
    """int64 places in `classes`; -1 without labels."""
    classes: tuple[str, ...]
    row_ids_path: Path
    captions: tuple[str, ...] = ()
    """One for each image; none without captions."""
    caption_tokens: CaptionTokens | None = None
    """The captions tokenized, where the stage reads them."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images_NCHW)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.report.channels, self.report.height, self.report.width)

    def row_ids(self, row: int) -> list[str]:
        """Return where an image came from; what an error message names."""
        return [self.row_ids_path.read_text(encoding="utf-8").split("\n")[row]]

    def with_classes(self, classes: Sequence[str]) -> "ImageDataset":
        """Return the set with labels numbered as in `classes`; raises RequestError for a label that is not there."""
        if tuple(classes) == self.classes:
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise RequestError(f"labels {', '.join(unknown[:8])} of the held-out images are not in the training data")
        places = np.array([classes.index(name) for name in self.classes] + [NO_LABEL], dtype=np.int64)
        return replace(self, labels_N=places[self.labels_N], classes=tuple(classes))


@dataclass(frozen=True)
class ImageRequest:
    """Everything that decides the pixels of a set; `base_dir` only says where relative paths start."""

    source: ImageSource
    base_dir: Path
    seed: int
    """Draws the images that `limit` keeps."""
    held_out: bool = False
    """Take what the source's `hold_out` keeps away from training, instead of the others."""
    source_digest: str | None = None
    """The source's digest when the run started; None computes it. Files that changed since then are an error."""

    def digest(self) -> str:
        """Return the set's identity: 64 hex digits over content, selection and FORMAT."""
        selection = self.source.model_dump(mode="json", exclude=set(LOCATION_KEYS))
        if selection["limit"] is not None:
            selection["seed"] = self.seed
        identity = {
            "format": FORMAT,
            "form": "images",
            "content": self.source_digest or open_source(self.source, self.base_dir).digest(),
            "selection": selection,
            "held_out": self.held_out,
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()


def materialise_images(request: ImageRequest, store: Store) -> ImageDataset:
    """Open the set from the store, or build and commit it; of concurrent builders the first commit wins.

    Building holds the set in memory twice. Raises RequestError for no images, for images of several shapes (naming
    two) and for anything unreadable.
    """
    digest = request.digest()
    found = find_set(digest, store)
    if found is None:
        found = _build(request, digest, store)
    meta = json.loads(store.objects.get_bytes(found.files["meta.json"].sha256))

    def array(name: str) -> np.ndarray:
        path = store.objects.local_path(found.files[f"{name}.npy"].sha256)
        loaded: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return loaded

    return ImageDataset(
        digest=digest,
        report=ImageReport(**meta["report"]),
        images_NCHW=array("images"),
        labels_N=array("labels"),
        classes=tuple(meta["classes"]),
        row_ids_path=store.objects.local_path(found.files["row_ids.txt"].sha256),
        captions=tuple(json.loads(store.objects.get_bytes(found.files["captions.json"].sha256)))
        if "captions.json" in found.files
        else (),
    )


def _build(request: ImageRequest, digest: str, store: Store) -> DatasetManifest:
    source = request.source
    if request.source_digest not in (None, open_source(source, request.base_dir).digest()):
        raise RequestError(f"the data of source '{source.source}' changed since the run started; start a new run")
    one_shape = OneShape()
    read = read_images(source, request.base_dir, request.seed, held_out=request.held_out)
    decoded = [one_shape.require(image) for image in read]
    if not decoded:
        raise RequestError(f"source '{source.source}': no images (files, part, limit or hold_out leave nothing)")
    classes, labels = _number(decoded)
    captions = [image.caption for image in decoded if image.caption is not None]
    images = np.ascontiguousarray(np.stack([image.pixels_HWC for image in decoded]).transpose(0, 3, 1, 2))
    _, channels, height, width = images.shape
    report = ImageReport(len(decoded), channels, height, width, len(classes), len(set(captions)))
    names = "".join(" ".join(image.id.splitlines()) + "\n" for image in decoded)
    files = {
        "meta.json": _put(canonical_json({"form": "images", "classes": classes, "report": asdict(report)}), store),
        "row_ids.txt": _put(names.encode(), store),
        "images.npy": _put(_npy(images), store),
        "labels.npy": _put(_npy(labels), store),
    }
    if captions:
        files["captions.json"] = _put(canonical_json(captions), store)
    return store.put_dataset(DatasetManifest(digest=digest, files=files, report=report.to_json()))


def _number(images: list[DecodedImage]) -> tuple[list[str], np.ndarray]:
    """Number the labels: whole numbers by size, texts by the alphabet."""
    found: set[Label] = {image.label for image in images}
    if found == {None}:
        return [], np.full(len(images), NO_LABEL, dtype=np.int64)
    ordered = sorted(
        found, key=lambda label: (isinstance(label, str), label if isinstance(label, int) else 0, str(label))
    )
    places = {label: place for place, label in enumerate(ordered)}
    return [str(label) for label in ordered], np.array([places[image.label] for image in images], dtype=np.int64)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _put(content: bytes, store: Store) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(content), bytes=len(content))
