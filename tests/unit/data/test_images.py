"""Pictures from every kind of source, and what is said of bad ones."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from recipes.errors import RequestError
from recipes.image_data import ImageSource
from recipes.load import load_recipe
from trainers.data.batches import AFTER_WARM_UP, BatchPlan, ImageBatch, evaluation_batches
from trainers.data.digit_captions import NAMES, caption_of, measure
from trainers.data.image_sets import ImageDataset, ImageRequest, materialise_images
from trainers.data.images import image_source_digest, read_pictures
from trainers.store.store import Store

IMAGE_RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "image"
SOURCE: TypeAdapter[Any] = TypeAdapter(ImageSource)


def source(**keys: Any) -> Any:
    """Give a source of the recipe."""
    return SOURCE.validate_python(keys)


def png(pixels: np.ndarray) -> bytes:
    """Encode a picture."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def pixels(number: int, channels: int = 1, size: int = 6) -> np.ndarray:
    """Give a picture that no other number has."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (size, size, channels), dtype=np.uint8)


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write MNIST's two files."""
    for name, array in (("images", images), ("labels", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))


def _idx(folder: Path) -> dict[str, Any]:
    images = np.stack([pixels(n)[:, :, 0] for n in range(9)])
    write_idx(folder, images, np.arange(9, dtype=np.uint8) % 3)
    return {"source": "idx", "files": ["images.gz"], "label_files": ["labels.gz"]}


def _folder(folder: Path) -> dict[str, Any]:
    for number in range(9):
        place = folder / "pictures" / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(pixels(number)[:, :, 0]))
    return {"source": "image-folder", "path": "pictures"}


def _arrays(folder: Path) -> dict[str, Any]:
    np.savez(folder / "a.npz", images=np.stack([pixels(n) for n in range(9)]), kinds=np.arange(9) % 3)
    return {"source": "arrays", "files": ["*.npz"], "labels": "kinds"}


def _parquet(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": {"bytes": png(pixels(n)[:, :, 0]), "path": None}, "label": n % 3} for n in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return {"source": "parquet", "files": ["a.parquet"], "label": "label"}


def _datasets(folder: Path) -> dict[str, Any]:
    import datasets

    rows = {"image": [{"bytes": png(pixels(n)[:, :, 0]), "path": None} for n in range(9)], "label": list(range(9))}
    rows["label"] = [number % 3 for number in range(9)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "set")
    return {"source": "datasets", "path": "set", "label": "label"}


SOURCES: list[Callable[[Path], dict[str, Any]]] = [_idx, _folder, _arrays, _parquet, _datasets]


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__[1:])
def test_every_source_gives_the_same_pictures(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    read = list(read_pictures(source(**write(tmp_path)), tmp_path, seed=0))
    found = {picture.key(): int(str(picture.label)) for picture in read}
    wanted = {next(iter(_keys(n))): n % 3 for n in range(9)}
    assert found == wanted
    assert all(picture.pixels_HWC.shape == (6, 6, 1) for picture in read)


def _keys(number: int) -> set[bytes]:
    from trainers.data.images import Picture

    return {Picture("", pixels(number), None).key()}


def test_the_digits_are_scikit_learn_s() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    read = list(read_pictures(source(source="digits"), Path(), seed=0))
    assert len(read) == 1797
    assert [picture.label for picture in read] == theirs.target.tolist()
    ours = np.stack([picture.pixels_HWC[:, :, 0] for picture in read])
    np.testing.assert_array_equal(ours, np.rint(theirs.images * 255 / 16).astype(np.uint8))


def test_the_shipped_files_hold_the_pictures_that_they_are_said_to() -> None:
    def read(recipe: str) -> dict[bytes, str]:
        stage = next(iter(load_recipe(IMAGE_RECIPES / recipe).recipe.stages.values()))
        return {
            picture.key(): str(picture.label) for picture in read_pictures(_whole(stage.data), IMAGE_RECIPES, seed=0)
        }

    digits = {picture.key(): str(picture.label) for picture in read_pictures(source(source="digits"), Path(), seed=0)}
    assert read("classifier_files.yaml") == digits
    assert read("ddpm_files.yaml") == digits
    shapes = read_pictures(
        source(source="arrays", files=["files/shapes.npz"], caption_files=["files/shapes.csv"], size=16, channels=3),
        IMAGE_RECIPES,
        seed=0,
    )
    kinds = {picture.key(): str(picture.caption).split()[-1] for picture in shapes}
    folder = read("gan_files.yaml")
    assert len(folder) == 48
    assert folder.items() <= kinds.items()


def _whole(data: Any) -> Any:
    """The source without what it holds out."""
    return data.model_copy(update={"hold_out": 0.0})


def test_hold_out_part_and_limit_are_disjoint_and_repeatable(tmp_path: Path) -> None:
    keys = _arrays(tmp_path)

    def ids(held_out: bool = False, **more: Any) -> list[str]:
        return [p.id for p in read_pictures(source(**keys, **more), tmp_path, seed=1, held_out=held_out)]

    everything = ids()
    kept, held = ids(hold_out=0.4), ids(held_out=True, hold_out=0.4)
    assert sorted(kept + held) == sorted(everything)
    assert kept
    assert held
    first, second = ids(part="1/2"), ids(part="2/2")
    assert sorted(first + second) == sorted(everything)
    assert len(ids(limit=4)) == 4
    assert ids(limit=4) == ids(limit=4)


def test_pictures_are_brought_to_one_form(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    np.savez(tmp_path / "a.npz", images=rgba[None])
    (picture,) = read_pictures(source(source="arrays", files=["a.npz"], channels=3, size=2), tmp_path, seed=0)
    assert picture.pixels_HWC.shape == (2, 2, 3)
    assert abs(int(picture.pixels_HWC[0, 0, 0]) - 100) <= 1
    assert picture.pixels_HWC[0, 0, 1:].tolist() == [0, 0]


def _damaged(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _folder(folder)
    place = folder / "pictures" / "1" / "4.png"
    place.write_bytes(place.read_bytes()[:40])
    return keys, "4.png: not a readable picture"


def _sizes(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _folder(folder)
    (folder / "pictures" / "2" / "big.png").write_bytes(png(pixels(30, size=7)[:, :, 0]))
    return keys, "2/big.png is 7x7 with 1 channel, 0/0.png is 6x6 with 1 channel; set `size`"


def _colours(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _folder(folder)
    (folder / "pictures" / "2" / "red.png").write_bytes(png(pixels(30, channels=3)))
    return keys, "2/red.png is 6x6 with 3 channels, 0/0.png is 6x6 with 1 channel; set `channels`"


def _cut_off(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _idx(folder)
    (folder / "images.gz").write_bytes(gzip.compress(gzip.decompress((folder / "images.gz").read_bytes())[:-5]))
    return keys, "images.gz is cut off: 319 bytes of 9x6x6"


def _wrong_labels(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _idx(folder)
    write_idx(folder, np.stack([pixels(n)[:, :, 0] for n in range(9)]), np.zeros(8, dtype=np.uint8))
    return keys, "labels.gz has 8 labels, .*images.gz 9 pictures"


def _no_array(folder: Path) -> tuple[dict[str, Any], str]:
    return _arrays(folder) | {"images": "pics"}, "a.npz: no array 'pics'; it has images, kinds"


def _empty(folder: Path) -> tuple[dict[str, Any], str]:
    (folder / "pictures").mkdir()
    return {"source": "image-folder", "path": "pictures"}, "holds no pictures"


def _no_column(folder: Path) -> tuple[dict[str, Any], str]:
    return _parquet(folder) | {"image": "img"}, "a.parquet: row 1: no 'img'; it has image, label"


@pytest.mark.parametrize(
    "spoil",
    [_damaged, _sizes, _colours, _cut_off, _wrong_labels, _no_array, _empty, _no_column],
    ids=lambda f: f.__name__,
)
def test_a_bad_picture_is_named(tmp_path: Path, spoil: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    keys, said = spoil(tmp_path)
    with pytest.raises(RequestError, match=said):
        materialise_images(ImageRequest(source(**keys), tmp_path, 0), Store.open(str(tmp_path / "store")))


def open_set(tmp_path: Path, **more: Any) -> ImageDataset:
    """Materialise the arrays."""
    request = ImageRequest(source(**_arrays(tmp_path), **more), tmp_path, 0)
    return materialise_images(request, Store.open(str(tmp_path / "store")))


def test_a_set_is_built_once_and_memory_mapped(tmp_path: Path) -> None:
    dataset, again = open_set(tmp_path), open_set(tmp_path)
    assert dataset.digest == again.digest
    assert isinstance(dataset.images_NCHW, np.memmap)
    assert dataset.shape == (1, 6, 6)
    assert dataset.classes == ("0", "1", "2")
    assert dataset.labels_N.tolist() == [0, 1, 2] * 3
    assert dataset.row_ids(4) == ["a.npz:4"]
    assert json.loads(json.dumps(dataset.report.to_json()))["rows_in"] == 9
    np.testing.assert_array_equal(dataset.images_NCHW[3].transpose(1, 2, 0), pixels(3))


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    keys = source(**_arrays(tmp_path))
    before = image_source_digest(keys, tmp_path)
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    assert image_source_digest(keys, tmp_path) == before
    np.savez(tmp_path / "b.npz", images=np.zeros((9, 6, 6), dtype=np.uint8), kinds=np.arange(9))
    assert image_source_digest(keys, tmp_path) != before


def test_noise_follows_the_position_not_the_rank(tmp_path: Path) -> None:
    dataset = open_set(tmp_path)

    def seeds(workers: int, micro_batch: int, step: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for rank in range(workers):
            for batch in BatchPlan(dataset, 3, 4, workers, rank, micro_batch).micro_batches(step):
                assert isinstance(batch, ImageBatch)
                assert batch.step == step
                found |= dict(zip(batch.sample_ids_B.tolist(), batch.noise_seeds_B.tolist(), strict=True))
        return found

    assert seeds(1, 4, 0) == seeds(2, 1, 0) == seeds(2, 2, 0)
    assert set(seeds(1, 4, 0).values()).isdisjoint(seeds(1, 4, 1).values())


def test_evaluation_batches_fill_up_and_repeat(tmp_path: Path) -> None:
    dataset = open_set(tmp_path)
    batches = [batch for rank in range(2) for batch in evaluation_batches(dataset, 9, 2, rank, 4)]
    assert all(isinstance(batch, ImageBatch) and batch.step == AFTER_WARM_UP for batch in batches)
    rows = [row for batch in batches for row in batch.sample_ids_B.tolist()]
    assert sorted(row for row in rows if row >= 0) == list(range(9))
    assert rows.count(-1) == 7


def test_held_out_labels_are_numbered_as_the_training_s(tmp_path: Path) -> None:
    dataset = open_set(tmp_path)
    renumbered = dataset.with_classes(["2", "1", "0", "9"])
    assert renumbered.labels_N.tolist() == [2, 1, 0] * 3
    with pytest.raises(RequestError, match="labels 2 of the held-out pictures are not in the training data"):
        dataset.with_classes(["0", "1"])


def test_a_damaged_set_is_built_again(tmp_path: Path) -> None:
    dataset = open_set(tmp_path)
    path = Path(str(dataset.images_NCHW.filename))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    np.testing.assert_array_equal(open_set(tmp_path).images_NCHW[3].transpose(1, 2, 0), pixels(3))


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
    read = list(read_pictures(source(source="digits"), Path(), seed=0))
    assert all(NAMES[int(str(picture.label))] in str(picture.caption).split() for picture in read)
    words = [word for picture in read for word in str(picture.caption).split()]
    shares = {word: words.count(word) / len(read) for word in ("thin", "thick", "narrow", "wide", "left", "right")}
    assert all(0.15 < share < 0.45 for share in shares.values()), shares
    assert read[0].caption == next(iter(read_pictures(source(source="digits", size=16), Path(), seed=0))).caption


def _captioned_folder(folder: Path) -> dict[str, Any]:
    keys = _folder(folder)
    for path in (folder / "pictures").rglob("*.png"):
        path.with_suffix(".txt").write_text(f" picture  {path.stem}\n")
    return {**keys, "captions": "beside"}


def _captioned_metadata(folder: Path) -> dict[str, Any]:
    keys = _folder(folder)
    names = [path.relative_to(folder / "pictures").as_posix() for path in (folder / "pictures").rglob("*.png")]
    rows = [{"file_name": name, "text": f"picture {Path(name).stem}"} for name in names]
    (folder / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**keys, "captions": "metadata"}


def _captioned_arrays(folder: Path) -> dict[str, Any]:
    (folder / "a.csv").write_text("number,words\n" + "".join(f'{n},"picture {n}"\n' for n in range(9)))
    return {**_arrays(folder), "caption_files": ["a.csv"], "caption": "words"}


def _captioned_lines(folder: Path) -> dict[str, Any]:
    _folder(folder)
    rows = [{"image": f"pictures/{n % 3}/{n}.png", "label": n % 3, "words": f"picture {n}"} for n in range(9)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "files": ["a.jsonl"], "label": "label", "caption": "words"}


def _captioned_parquet(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    keys = _parquet(folder)
    table = pyarrow.parquet.read_table(folder / "a.parquet")
    table = table.append_column("words", [[f"picture {n}" for n in range(9)]])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return {**keys, "caption": "words"}


CAPTIONED = [_captioned_folder, _captioned_metadata, _captioned_arrays, _captioned_lines, _captioned_parquet]


@pytest.mark.parametrize("write", CAPTIONED, ids=lambda write: write.__name__[11:])
def test_every_source_gives_the_same_captions(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    keys = source(**write(tmp_path))
    read = list(read_pictures(keys, tmp_path, seed=0))
    found = {picture.key(): picture.caption for picture in read}
    assert found == {next(iter(_keys(n))): f"picture {n}" for n in range(9)}
    before = image_source_digest(keys, tmp_path)
    named = next(path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".txt", ".jsonl", ".csv", ".parquet"))
    if named.suffix != ".parquet":
        named.write_text(named.read_text().replace("picture ", "drawing "))
        assert image_source_digest(keys, tmp_path) != before
    dataset = materialise_images(ImageRequest(keys, tmp_path, 0), Store.open(str(tmp_path / "store")))
    assert len(dataset.captions) == 9
    assert dataset.report.captions == 9


def _no_text_beside(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_folder(folder)
    (folder / "pictures" / "1" / "4.txt").unlink()
    return keys, "4.txt: no such file; captions: beside needs one for each picture"


def _no_metadata_row(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_metadata(folder)
    path = folder / "pictures" / "metadata.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    return keys, r"metadata.jsonl has no caption for .*png \(2 of 9 pictures\)"


def _no_caption_column(folder: Path) -> tuple[dict[str, Any], str]:
    return {**_captioned_arrays(folder), "caption": "text"}, "a.csv: no column 'text'; it has number, words"


def _fewer_captions(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_arrays(folder)
    (folder / "a.csv").write_text("words\none\n")
    return keys, "a.csv has 1 captions, .*a.npz 9 pictures"


def _no_such_picture(folder: Path) -> tuple[dict[str, Any], str]:
    keys = _captioned_lines(folder)
    (folder / "pictures" / "1" / "4.png").unlink()
    return keys, "a.jsonl:5: .*4.png: No such file"


def _no_caption_text(folder: Path) -> tuple[dict[str, Any], str]:
    return {**_captioned_lines(folder), "caption": "label"}, "a.jsonl:1: caption 0 is no text"


@pytest.mark.parametrize(
    "spoil",
    [_no_text_beside, _no_metadata_row, _no_caption_column, _fewer_captions, _no_such_picture, _no_caption_text],
    ids=lambda f: f.__name__,
)
def test_bad_captions_are_named(tmp_path: Path, spoil: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    keys, said = spoil(tmp_path)
    with pytest.raises(RequestError, match=said):
        materialise_images(ImageRequest(source(**keys), tmp_path, 0), Store.open(str(tmp_path / "store")))
