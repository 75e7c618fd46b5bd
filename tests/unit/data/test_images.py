"""Images from every kind of source, and what is said of bad ones."""

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipes.errors import RequestError
from recipes.loading.load import load_recipe
from trainers.data.images import open_image, read_images
from trainers.data.layouts.images import Images
from trainers.data.materialise import DataRequest, materialise
from trainers.data.sources.open import open_source
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from image_files import (
    array_file,
    idx_files,
    image_folder,
    image_key,
    parquet_file,
    pixels,
    png,
    saved_dataset,
    source,
    write_idx,
)

sys.path.pop(0)

IMAGE_RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "image"
SOURCES: list[Callable[[Path], dict[str, Any]]] = [idx_files, image_folder, array_file, parquet_file, saved_dataset]


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_every_source_gives_the_same_images(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    read = list(read_images(source(**write(tmp_path)), tmp_path, seed=0))
    found = {image.key(): int(str(image.label)) for image in read}
    wanted = {image_key(n): n % 3 for n in range(9)}
    assert found == wanted
    assert all(image.pixels_HWC.shape == (6, 6, 1) for image in read)


def test_the_digits_are_scikit_learn_s() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    read = list(read_images(source(source="digits"), Path(), seed=0))
    assert len(read) == 1797
    assert [image.label for image in read] == theirs.target.tolist()
    ours = np.stack([image.pixels_HWC[:, :, 0] for image in read])
    np.testing.assert_array_equal(ours, np.rint(theirs.images * 255 / 16).astype(np.uint8))


def test_the_shipped_files_hold_the_images_that_they_are_said_to() -> None:
    def read(recipe: str) -> dict[bytes, str]:
        stage = next(iter(load_recipe(IMAGE_RECIPES / recipe).recipe.stages.values()))
        return {image.key(): str(image.label) for image in read_images(_whole(stage.data), IMAGE_RECIPES, seed=0)}

    digits = {image.key(): str(image.label) for image in read_images(source(source="digits"), Path(), seed=0)}
    assert read("classifier_files.yaml") == digits
    assert read("ddpm_files.yaml") == digits
    shapes = read_images(
        source(source="arrays", files=["files/shapes.npz"], caption_files=["files/shapes.csv"], size=16, channels=3),
        IMAGE_RECIPES,
        seed=0,
    )
    kinds = {image.key(): str(image.caption).split()[-1] for image in shapes}
    folder = read("gan_files.yaml")
    assert len(folder) == 48
    assert folder.items() <= kinds.items()


def _whole(data: Any) -> Any:
    """The source without what it holds out."""
    return data.model_copy(update={"hold_out": 0.0})


def test_hold_out_part_and_limit_are_disjoint_and_repeatable(tmp_path: Path) -> None:
    keys = array_file(tmp_path)

    def ids(held_out: bool = False, **more: Any) -> list[str]:
        return [p.id for p in read_images(source(**keys, **more), tmp_path, seed=1, held_out=held_out)]

    everything = ids()
    kept, held = ids(hold_out=0.4), ids(held_out=True, hold_out=0.4)
    assert sorted(kept + held) == sorted(everything)
    assert kept
    assert held
    first, second = ids(part="1/2"), ids(part="2/2")
    assert sorted(first + second) == sorted(everything)
    assert len(ids(limit=4)) == 4
    assert ids(limit=4) == ids(limit=4)


def test_images_are_brought_to_one_form(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    np.savez(tmp_path / "a.npz", images=rgba[None])
    (image,) = read_images(source(source="arrays", files=["a.npz"], channels=3, size=2), tmp_path, seed=0)
    assert image.pixels_HWC.shape == (2, 2, 3)
    assert abs(int(image.pixels_HWC[0, 0, 0]) - 100) <= 1
    assert image.pixels_HWC[0, 0, 1:].tolist() == [0, 0]


def test_one_decoder_turns_images_upright_and_reads_16_bits(tmp_path: Path) -> None:
    upright = pixels(0, channels=3)[:4]
    (tmp_path / "images").mkdir()
    for tag, stored in ((3, np.rot90(upright, 2)), (6, np.rot90(upright, 1)), (8, np.rot90(upright, 3))):
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "images" / f"{tag}.png", exif=exif)
    keys = source(source="image-folder", path="images", labels="none")
    for image in read_images(keys, tmp_path, seed=0):
        np.testing.assert_array_equal(image.pixels_HWC, upright)
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, format="PNG")
    np.testing.assert_array_equal(np.asarray(open_image(file.getvalue(), "deep.png")), deep >> 8)


def test_a_folder_is_read_without_what_systems_and_tools_leave_there(tmp_path: Path) -> None:
    keys = image_folder(tmp_path)
    before = [image.id for image in read_images(source(**keys), tmp_path, seed=0)]
    digest = open_source(source(**keys), tmp_path).digest()
    for name in (".ipynb_checkpoints/4.png", "__MACOSX/4.png", "1/._4.png"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"Mac OS X")
    assert [image.id for image in read_images(source(**keys), tmp_path, seed=0)] == before
    assert open_source(source(**keys), tmp_path).digest() == digest


def test_captions_are_found_however_their_files_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "caf\u00e9.png").write_bytes(png(pixels(0)[:, :, 0]))
    (folder / "caf\u00e9.txt").write_bytes(b"\xef\xbb\xbfa thick seven\r\n")
    said = {"file_name": "./cafe\u0301.png", "text": "a thick seven", "artist": "Ann"}
    (folder / "metadata.jsonl").write_text(json.dumps(said))
    for captions in ("beside", "metadata"):
        keys = source(source="image-folder", path="images", labels="none", captions=captions)
        unread = ("metadata.artist",) if captions == "metadata" else ()
        (image,) = read_images(keys, tmp_path, seed=0)
        assert (image.caption, image.unread) == ("a thick seven", unread)


def _splits(folder: Path) -> tuple[dict[str, Any], str]:
    for split in ("train", "test"):
        place = folder / "images" / split / "a"
        place.mkdir(parents=True)
        (place / "0.png").write_bytes(png(pixels(0)[:, :, 0]))
    return {"source": "image-folder", "path": "images"}, "are splits of a data set, not classes; path: images/train"


def _damaged(folder: Path) -> tuple[dict[str, Any], str]:
    keys = image_folder(folder)
    place = folder / "images" / "1" / "4.png"
    place.write_bytes(place.read_bytes()[:40])
    return keys, "4.png: not a readable image"


def _sizes(folder: Path) -> tuple[dict[str, Any], str]:
    keys = image_folder(folder)
    (folder / "images" / "2" / "big.png").write_bytes(png(pixels(30, size=7)[:, :, 0]))
    return keys, "2/big.png is 7x7 with 1 channel, 0/0.png is 6x6 with 1 channel; set `size`"


def _colours(folder: Path) -> tuple[dict[str, Any], str]:
    keys = image_folder(folder)
    (folder / "images" / "2" / "red.png").write_bytes(png(pixels(30, channels=3)))
    return keys, "2/red.png is 6x6 with 3 channels, 0/0.png is 6x6 with 1 channel; set `channels`"


def _cut_off(folder: Path) -> tuple[dict[str, Any], str]:
    keys = idx_files(folder)
    (folder / "images.gz").write_bytes(gzip.compress(gzip.decompress((folder / "images.gz").read_bytes())[:-5]))
    return keys, "images.gz is cut off: 319 bytes of 9x6x6"


def _wrong_labels(folder: Path) -> tuple[dict[str, Any], str]:
    keys = idx_files(folder)
    write_idx(folder, np.stack([pixels(n)[:, :, 0] for n in range(9)]), np.zeros(8, dtype=np.uint8))
    return keys, "labels.gz has 8 labels, .*images.gz 9 images"


def _no_array(folder: Path) -> tuple[dict[str, Any], str]:
    return array_file(folder) | {"images": "pics"}, "a.npz: no array 'pics'; arrays there: images, kinds"


def _empty(folder: Path) -> tuple[dict[str, Any], str]:
    (folder / "images").mkdir()
    return {"source": "image-folder", "path": "images"}, "holds no images"


def _no_column(folder: Path) -> tuple[dict[str, Any], str]:
    return parquet_file(folder) | {"image": "img"}, "a.parquet: row 1: no column 'img'; columns there: 'image', 'label'"


@pytest.mark.parametrize(
    "spoil",
    [_damaged, _splits, _sizes, _colours, _cut_off, _wrong_labels, _no_array, _empty, _no_column],
    ids=lambda f: f.__name__,
)
def test_a_bad_image_is_named(tmp_path: Path, spoil: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    keys, said = spoil(tmp_path)
    with pytest.raises(RequestError, match=said):
        materialise(DataRequest(source(**keys), tmp_path, Images(), 0), Store.open(str(tmp_path / "store")))
