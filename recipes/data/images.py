"""Sources of pictures: scikit-learn's digits, IDX files, folders, arrays, JSON lines, Parquet and `datasets`."""

from typing import Annotated, Literal

from pydantic import Field

from recipes.data.text import DatasetsPlace, Patterns, Selection
from recipes.fields import Strict, Whole, meaning


class _Pictures(Selection):
    """What every source of pictures can be asked for besides its rows."""

    hold_out: float = meaning(
        0.0,
        ge=0,
        lt=1,
        description="Share of pictures, by the hash of their pixels, kept out of training and used for evaluation.",
    )
    size: int | None = meaning(
        None,
        ge=1,
        le=4096,
        description="Height and width in pixels to which every picture is resized; None: as they are, all of one size.",
    )
    channels: Annotated[Literal[1, 3, 4], Whole] | None = meaning(
        None,
        description="1 grey, 3 RGB (alpha is laid over black), 4 RGBA; None: as they are, all of one number.",
    )


class Digits(_Pictures):
    """scikit-learn's 1,797 real handwritten digits of 8x8 grey pixels; every installation has them.

    Each has a caption that is measured on its pixels: "a thick narrow seven leaning right".
    """

    source: Literal["digits"] = meaning(description="Reads scikit-learn's handwritten digits.")


class Idx(_Pictures):
    """Files in the IDX format of MNIST; `.gz` is read too."""

    source: Literal["idx"] = meaning(description="Reads IDX files, MNIST's format.")
    files: list[str] = meaning(
        min_length=1, description="Paths of files with pictures, relative to the recipe's folder; read in this order."
    )
    label_files: list[str] = meaning(
        default_factory=list,
        description="Paths of files with labels, one for each file with pictures; none: no labels.",
    )


class ImageFolder(_Pictures):
    """A folder of pictures that Pillow opens (PNG, JPEG, ...), read in the order of their names."""

    source: Literal["image-folder"] = meaning(description="Reads pictures in a folder and the folders below it.")
    path: str = meaning(description="The folder, relative to the recipe's.")
    labels: Literal["folder", "none"] = meaning(
        "folder", description="folder: a picture's label is the name of the folder below `path` that it lies in."
    )
    captions: Literal["none", "beside", "metadata"] = meaning(
        "none",
        description="beside: a picture's caption stands in a text file of its name, 7.txt for 7.png; metadata: in the "
        "metadata.jsonl or metadata.csv in `path`, by the column file_name.",
    )
    caption: str = meaning("text", description="captions: metadata: column of captions.")


class ImageArrays(_Pictures, Patterns):
    """NumPy files (`.npy`, `.npz`) with an array [N, H, W] or [N, H, W, C]; floats must lie in [0, 1]."""

    source: Literal["arrays"] = meaning(description="Reads NumPy's .npy and .npz files.")
    files: list[str] = meaning(
        min_length=1,
        description="Paths or glob patterns, relative to the recipe's folder; read in this order, a pattern's sorted.",
    )
    images: str = meaning("images", description="Name of the array of pictures in an .npz file.")
    labels: str | None = meaning(None, description="Name of the array of labels in an .npz file; None: no labels.")
    caption_files: list[str] = meaning(
        default_factory=list,
        description="Paths of CSV or TSV files with captions, one for each file with pictures, a row for each of its "
        "pictures in their order, relative to the recipe's folder; none: no captions.",
    )
    caption: str = meaning("caption", description="Column of captions in caption_files.")


class _Column(Strict):
    image: str = meaning(
        "image", description="Column of pictures: encoded bytes, {bytes, path} as `datasets` writes them, or numbers."
    )
    label: str | None = meaning(None, description="Column of labels; None: no labels.")
    caption: str | None = meaning(None, description="Column of captions; None: no captions.")


class ImageJsonLines(_Pictures, _Column, Patterns):
    """One JSON object a line; a picture is the path of a file, starting at the lines' folder, or nested numbers."""

    source: Literal["jsonl"] = meaning(description="Reads files with one JSON object a line.")


class ImageParquet(_Pictures, _Column, Patterns):
    """Apache Parquet with a column of pictures."""

    source: Literal["parquet"] = meaning(description="Reads Apache Parquet files.")


class ImageDatasets(_Pictures, _Column, DatasetsPlace):
    """A `datasets` data set with a column of pictures: a local folder, or a hub id with its revision."""

    source: Literal["datasets"] = meaning(description="Reads a data set through the `datasets` library.")


ImageSource = Annotated[
    Digits | Idx | ImageFolder | ImageArrays | ImageJsonLines | ImageParquet | ImageDatasets,
    Field(discriminator="source"),
]


def known_classes(source: ImageSource) -> list[str] | None:
    """Classes that the source's pictures have; None: only its files tell."""
    return [str(digit) for digit in range(10)] if isinstance(source, Digits) else None


def label_key(source: ImageSource) -> str | None:
    """The key that has to be set for the source's pictures to have labels; None: they have."""
    match source:
        case Digits():
            return None
        case Idx():
            return None if source.label_files else "label_files"
        case ImageFolder():
            return "labels" if source.labels == "none" else None
        case ImageArrays():
            return "labels" if source.labels is None else None
        case _:
            return "label" if source.label is None else None


def caption_key(source: ImageSource) -> str | None:
    """The key that has to be set for the source's pictures to have captions; None: they have, '': they cannot."""
    match source:
        case Digits():
            return None
        case Idx():
            return ""
        case ImageFolder():
            return "captions" if source.captions == "none" else None
        case ImageArrays():
            return None if source.caption_files else "caption_files"
        case _:
            return "caption" if source.caption is None else None
