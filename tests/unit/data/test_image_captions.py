"""Captions of images: measured on the digits, read from every kind of source, and what is said of bad ones."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.errors import RequestError
from trainers.data.demo.digit_captions import NAMES, caption_of, measure
from trainers.data.images import read_images
from trainers.data.layouts.images import Images
from trainers.data.materialise import DataRequest, materialise
from trainers.data.sources.open import open_source
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from image_files import array_file, image_folder, image_key, parquet_file, source

sys.path.pop(0)


def test_a_digit_s_caption_is_measured_on_its_pixels() -> None:
    bar = np.zeros((8, 8), dtype=np.uint8)
    bar[:, 3:5] = 255
    assert caption_of(bar, 1) == "a thick narrow one"
    slope = np.zeros((8, 8), dtype=np.uint8)
    slope[range(8), range(7, -1, -1)] = 255
    assert caption_of(slope, 8) == "a thin wide eight leaning right"
    assert caption_of(slope[:, ::-1], 8) == "a thin wide eight leaning left"
    # 2 x 16 pixels of ink; the outline is 2 x 8 down, 2 across, and one corner that counts sqrt(2) for its 2 sides.
    assert measure(bar)[0] == pytest.approx(2 * 16 / (8 + 8 + 2 + 2 - 2 + 2**0.5))
    assert measure(np.zeros((8, 8), dtype=np.uint8)) == (0.0, 0.0, 0.0)


def test_the_digits_captions_name_their_labels_and_differ() -> None:
    read = list(read_images(source(source="digits"), Path(), seed=0))
    assert all(NAMES[int(str(image.label))] in str(image.caption).split() for image in read)
    words = [word for image in read for word in str(image.caption).split()]
    shares = {word: words.count(word) / len(read) for word in ("thin", "thick", "narrow", "wide", "left", "right")}
    assert all(0.15 < share < 0.45 for share in shares.values()), shares
    assert read[0].caption == next(iter(read_images(source(source="digits", size=16), Path(), seed=0))).caption


def _captioned_folder(folder: Path) -> dict[str, Any]:
    keys = image_folder(folder)
    for path in (folder / "images").rglob("*.png"):
        path.with_suffix(".txt").write_text(f" image  {path.stem}\n")
    return {**keys, "captions": "beside"}


def _captioned_metadata(folder: Path) -> dict[str, Any]:
    keys = image_folder(folder)
    names = [path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.png")]
    rows = [{"file_name": name, "text": f"image {Path(name).stem}"} for name in names]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**keys, "captions": "metadata"}


def _captioned_arrays(folder: Path) -> dict[str, Any]:
    (folder / "a.csv").write_text("number,words\n" + "".join(f'{n},"image {n}"\n' for n in range(9)))
    return {**array_file(folder), "caption_files": ["a.csv"], "caption": "words"}


def _captioned_lines(folder: Path) -> dict[str, Any]:
    image_folder(folder)
    rows = [{"image": f"images/{n % 3}/{n}.png", "label": n % 3, "words": f"image {n}"} for n in range(9)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "files": ["a.jsonl"], "label": "label", "caption": "words"}


def _captioned_parquet(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    keys = parquet_file(folder)
    table = pyarrow.parquet.read_table(folder / "a.parquet")
    table = table.append_column("words", [[f"image {n}" for n in range(9)]])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return {**keys, "caption": "words"}


CAPTIONED = [_captioned_folder, _captioned_metadata, _captioned_arrays, _captioned_lines, _captioned_parquet]


@pytest.mark.parametrize("write", CAPTIONED, ids=lambda write: write.__name__[11:])
def test_every_source_gives_the_same_captions(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    keys = source(**write(tmp_path))
    read = list(read_images(keys, tmp_path, seed=0))
    found = {image.key(): image.caption for image in read}
    assert found == {image_key(n): f"image {n}" for n in range(9)}
    before = open_source(keys, tmp_path).digest()
    named = next(path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".txt", ".jsonl", ".csv", ".parquet"))
    if named.suffix != ".parquet":
        named.write_text(named.read_text().replace("image ", "drawing "))
        assert open_source(keys, tmp_path).digest() != before
    dataset = materialise(DataRequest(keys, tmp_path, Images(), 0), Store.open(str(tmp_path / "store")))
    assert len(dataset.captions) == 9
    assert dataset.report.holds["captions"] == 9


def _no_text_beside(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_folder(folder)
    (folder / "images" / "1" / "4.txt").unlink()
    return keys, "4.png has no text file beside it; write 4.txt"


def _no_metadata_row(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_metadata(folder)
    path = folder / "images" / "metadata.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    return keys, r"metadata.jsonl has no caption for .*png \(2 of 9 images\)"


def _no_caption_column(folder: Path) -> tuple[dict[str, Any], str]:
    return {**_captioned_arrays(folder), "caption": "text"}, "a.csv: no column 'text'; columns there: 'number', 'words'"


def _fewer_captions(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_arrays(folder)
    (folder / "a.csv").write_text("words\none\n")
    return keys, "a.csv has 1 captions, .*a.npz 9 images"


def _no_such_image(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_lines(folder)
    (folder / "images" / "1" / "4.png").unlink()
    return keys, "a.jsonl:5: image .*4.png cannot be read: No such file"


def _no_caption_text(folder: Path) -> tuple[dict[str, Any], str]:
    return {**_captioned_lines(folder), "caption": "label"}, "a.jsonl:1: caption 0 is no text"


@pytest.mark.parametrize(
    "spoil",
    [_no_text_beside, _no_metadata_row, _no_caption_column, _fewer_captions, _no_such_image, _no_caption_text],
    ids=lambda f: f.__name__,
)
def test_bad_captions_are_named(tmp_path: Path, spoil: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    keys, said = spoil(tmp_path)
    with pytest.raises(RequestError, match=said):
        materialise(DataRequest(source(**keys), tmp_path, Images(), 0), Store.open(str(tmp_path / "store")))
