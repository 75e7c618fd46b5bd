"""Sources of images: scikit-learn's digits, IDX files, folders, arrays, JSON lines, Parquet and `datasets`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from recipes.data.selection import Selection
from recipes.data.text import DatasetsPlace, Patterns
from recipes.errors import Finding
from recipes.fields import Whole, meaning
from recipes.problem_codes import Code

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True)
class ImageSetFacts:
    """Size of a stage's images, and how many classes they have at most."""

    channels: int
    height: int
    width: int
    classes: int = 10
    """Where nothing tells it, ten are taken: it moves the number of parameters by a few rows of a matrix."""


METADATA = "metadata"
"""Stands before the columns of a folder's metadata in the rows of its images."""


class RowColumns(NamedTuple):
    """Columns of a row as a source's reader gives it; None: the source has none such."""

    image: str
    label: str | None
    caption: str | None


class _Images(Selection):
    """What every source of images answers besides its rows."""

    hold_out: float = meaning(
        0.0,
        ge=0,
        lt=1,
        description="Share of images, by the hash of their pixels, kept out of training and used for evaluation.",
    )
    size: int | None = meaning(
        None,
        ge=1,
        le=4096,
        description="Height and width in pixels to which every image is resized; null: as they are, all of one size.",
    )
    channels: Annotated[Literal[1, 3, 4], Whole] | None = meaning(
        None,
        description="1 grey, 3 RGB (alpha is laid over black), 4 RGBA; null: as they are, all of one number.",
    )

    @property
    def label_key(self) -> str | None:
        """The key that has to be set for the images to have labels; None: they have."""
        return None

    @property
    def caption_key(self) -> str | None:
        """The key that has to be set for the images to have captions; None: they have, '': they cannot."""
        return None

    @property
    def known_classes(self) -> list[str] | None:
        """Classes that the images have; None: only the files tell."""
        return None

    @property
    def row_columns(self) -> RowColumns:
        """Where a row of the reader has its image, label and caption."""
        return RowColumns(
            "image", "label" if self.label_key is None else None, "caption" if self.caption_key is None else None
        )

    def unread_columns(self, names: Iterable[str]) -> list[str]:
        """Columns of a row of the user's that nothing reads; other rows have none but the reader's own."""
        return []


class Digits(_Images):
    """scikit-learn's 1,797 real handwritten digits of 8x8 grey pixels; every installation has them.

    Each has a caption that is measured on its pixels: "a thick narrow seven leaning right".
    """

    source: Literal["digits"] = meaning(description="Reads scikit-learn's handwritten digits.")

    @property
    def known_classes(self) -> list[str]:
        """The ten digits."""
        return [str(digit) for digit in range(10)]


class Idx(_Images):
    """Files in the IDX format of MNIST; `.gz` is read too."""

    source: Literal["idx"] = meaning(description="Reads IDX files, MNIST's format.")
    files: list[str] = meaning(
        min_length=1, description="Paths of files with images, relative to the recipe's folder; read in this order."
    )
    label_files: list[str] = meaning(
        default_factory=list,
        description="Paths of files with labels, one for each file with images; none: no labels.",
    )

    @property
    def label_key(self) -> str | None:
        """Labels are in separate files."""
        return None if self.label_files else "label_files"

    @property
    def caption_key(self) -> str:
        """The format has no captions."""
        return ""


class ImageFolder(_Images):
    """A folder of images that Pillow opens (PNG, JPEG, ...), read in the order of their names."""

    source: Literal["image-folder"] = meaning(description="Reads images in a folder and the folders below it.")
    path: str = meaning(description="The folder, relative to the recipe's.")
    labels: Literal["folder", "none"] = meaning(
        "folder", description="folder: an image's label is the name of the folder below `path` that it lies in."
    )
    captions: Literal["none", "beside", "metadata"] = meaning(
        "none",
        description="beside: an image's caption is in a text file of the same name, 7.txt for 7.png; metadata: in the "
        "metadata.jsonl or metadata.csv in `path`, by the column file_name.",
    )
    caption: str = meaning("text", description="captions: metadata: column of captions.")

    def unread_columns(self, names: Iterable[str]) -> list[str]:
        """What the folder's metadata says besides captions."""
        return [name for name in names if name.startswith(f"{METADATA}.")]

    @property
    def label_key(self) -> str | None:
        """Labels are names of folders."""
        return "labels" if self.labels == "none" else None

    @property
    def caption_key(self) -> str | None:
        """Captions are in text files next to the images or in the folder's metadata."""
        return "captions" if self.captions == "none" else None


class ImageArrays(_Images, Patterns):
    """NumPy files (`.npy`, `.npz`) with an array [N, H, W] or [N, H, W, C]; floats must lie in [0, 1]."""

    source: Literal["arrays"] = meaning(description="Reads NumPy's .npy and .npz files.")
    files: list[str] = meaning(
        min_length=1,
        description="Paths or glob patterns, relative to the recipe's folder; read in this order, a pattern's sorted.",
    )
    images: str = meaning("images", description="Name of the array of images in an .npz file.")
    labels: str | None = meaning(None, description="Name of the array of labels in an .npz file; null: no labels.")
    caption_files: list[str] = meaning(
        default_factory=list,
        description="Paths of CSV or TSV files with captions, one for each file with images, a row for each of its "
        "images in their order, relative to the recipe's folder; none: no captions.",
    )
    caption: str = meaning("caption", description="Column of captions in caption_files.")

    @property
    def label_key(self) -> str | None:
        """Labels are an array."""
        return "labels" if self.labels is None else None

    @property
    def caption_key(self) -> str | None:
        """Captions are in separate files."""
        return None if self.caption_files else "caption_files"


class _ImageRows(_Images):
    image: str = meaning(
        "image", description="Column of images: encoded bytes, {bytes, path} as `datasets` writes them, or numbers."
    )
    label: str | None = meaning(None, description="Column of labels; null: no labels.")
    caption: str | None = meaning(None, description="Column of captions; null: no captions.")

    @property
    def label_key(self) -> str | None:
        """Labels are a column."""
        return "label" if self.label is None else None

    @property
    def caption_key(self) -> str | None:
        """Captions are a column."""
        return "caption" if self.caption is None else None

    @property
    def row_columns(self) -> RowColumns:
        """Columns as the recipe names them."""
        return RowColumns(self.image, self.label, self.caption)

    def unread_columns(self, names: Iterable[str]) -> list[str]:
        """All that the recipe does not name."""
        return [name for name in names if name not in self.row_columns]


class ImageJsonLines(_ImageRows, Patterns):
    """One JSON object a line; an image is the path of a file, starting at the lines' folder, or nested numbers."""

    source: Literal["jsonl"] = meaning(description="Reads files with one JSON object a line.")


class ImageParquet(_ImageRows, Patterns):
    """Apache Parquet with a column of images."""

    source: Literal["parquet"] = meaning(description="Reads Apache Parquet files.")


class ImageDatasets(_ImageRows, DatasetsPlace):
    """A `datasets` data set with a column of images: a local folder, or a hub id with its revision."""

    source: Literal["datasets"] = meaning(description="Reads a data set through the `datasets` library.")


ImageSource = Annotated[
    Digits | Idx | ImageFolder | ImageArrays | ImageJsonLines | ImageParquet | ImageDatasets,
    Field(discriminator="source"),
]


def missing_labels(reader: str, key: str = "") -> Finding:
    """The rule that images have the labels which `reader` reads; `key` would give them."""
    return Finding(Code.MISSING_LABELS, f"these images have no labels, which {reader} reads", key and f"set {key}")


def missing_captions(reader: str, key: str = "") -> Finding:
    """The rule that images have the captions which `reader` reads; `key` would give them."""
    advice = f"set {key}" if key else "a source of another kind holds captions: image-folder, arrays, jsonl, parquet"
    return Finding(Code.MISSING_CAPTIONS, f"these images have no captions, which {reader} reads", advice)


def shape_rule(here: Shape, there: Shape, name: str) -> Finding | None:
    """The rule that images here have the shape of those of `name`; None: they have."""
    if here == there:
        return None
    message = f"image shapes differ: {show_shape(here)} here, {show_shape(there)} in {name}"
    return Finding(Code.IMAGE_SHAPE_MISMATCH, message, "set size and channels of both sources")


def show_shape(shape: Shape) -> str:
    """A shape (channels, height, width) in words."""
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
