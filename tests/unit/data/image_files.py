"""Nine small images of three classes, written in every form that a recipe reads them from.

Each writer fills a folder and returns the source's keys.
"""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from recipes.data.images import ImageSource
from trainers.data.images import DecodedImage

SOURCE: TypeAdapter[Any] = TypeAdapter(ImageSource)


def source(**keys: Any) -> Any:
    """Give a source of the recipe."""
    return SOURCE.validate_python(keys)


def png(pixels: np.ndarray) -> bytes:
    """Encode an image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def pixels(number: int, channels: int = 1, size: int = 6) -> np.ndarray:
    """Give an image that no other number has."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (size, size, channels), dtype=np.uint8)


def image_key(number: int) -> bytes:
    """Return the key of an image by its number."""
    return DecodedImage("", pixels(number), None).key()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write MNIST's two files."""
    for name, array in (("images", images), ("labels", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))


def idx_files(folder: Path) -> dict[str, Any]:
    """Write them as MNIST is."""
    images = np.stack([pixels(n)[:, :, 0] for n in range(9)])
    write_idx(folder, images, np.arange(9, dtype=np.uint8) % 3)
    return {"source": "idx", "files": ["images.gz"], "label_files": ["labels.gz"]}


def image_folder(folder: Path) -> dict[str, Any]:
    """Write a folder of them for each class."""
    for number in range(9):
        place = folder / "images" / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(pixels(number)[:, :, 0]))
    return {"source": "image-folder", "path": "images"}


def array_file(folder: Path) -> dict[str, Any]:
    """Write them as numpy's arrays."""
    np.savez(folder / "a.npz", images=np.stack([pixels(n) for n in range(9)]), kinds=np.arange(9) % 3)
    return {"source": "arrays", "files": ["*.npz"], "labels": "kinds"}


def parquet_file(folder: Path) -> dict[str, Any]:
    """Write them as rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": {"bytes": png(pixels(n)[:, :, 0]), "path": None}, "label": n % 3} for n in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return {"source": "parquet", "files": ["a.parquet"], "label": "label"}


def saved_dataset(folder: Path) -> dict[str, Any]:
    """Save them as a data set of the datasets library."""
    import datasets

    rows = {"image": [{"bytes": png(pixels(n)[:, :, 0]), "path": None} for n in range(9)], "label": list(range(9))}
    rows["label"] = [number % 3 for number in range(9)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "set")
    return {"source": "datasets", "path": "set", "label": "label"}
