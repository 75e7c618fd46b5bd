"""Real images in their own form train and draw, where `../shared/data` beside the repository holds them."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from recipes.data.images import ImageSource
from recipes.loading.load import parse_recipe
from tests.observers import Quiet
from tests.tiers import tiered
from trainers.data.layouts.images import Images
from trainers.data.materialise import DataRequest, materialise
from trainers.runtime.distributed import Ranks
from trainers.store.store import Store
from trainers.tasks.images import run_image
from trainers.training.context import StageContext, verify_checks

DATA = Path(__file__).parents[4] / "shared" / "data" / "images"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data/images beside the repository")

SOURCE: TypeAdapter[Any] = TypeAdapter(ImageSource)
MNIST: dict[str, Any] = {
    "source": "idx",
    "files": ["mnist/train-images-idx3-ubyte.gz"],
    "label_files": ["mnist/train-labels-idx1-ubyte.gz"],
    "limit": 200,
    "hold_out": 0.1,
}
TILES: dict[str, Any] = {"source": "arrays", "files": ["crawl_tiles/tiles32_rgba.npz"], "limit": 64}
CONVNET = {"type": "convnet", "width": 4, "depth": 2}
DDPM = {"block_out_channels": [8, 8], "layers_per_block": 1, "timesteps": 10, "sampling_steps": 2}


def train(folder: Path, base_dir: Path, architecture: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Run a stage of three steps that draws; returns its candidate and its grid."""
    keys = {"steps": 3, "global_batch": 8, "optimizer": {"lr": 1e-3}, "grid": 4, "evaluation_rows": 8}
    shard = {"engine": "plain", "precision": "fp32"}
    stage = {"kind": "pretrain", "architecture": architecture, "data": data, "train": keys, "shard": shard}
    spec: Any = parse_recipe({"name": "real", "stages": {"model": stage}}).stages["model"]
    store = Store.open(str(folder / "store"))
    lease = store.take_lease("run", "model")
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    context = StageContext(store, "run", "model", "a" * 64, lease, 0, base_dir, {}, {}, Quiet(), ranks)
    candidate: Any = run_image(spec, context)
    assert verify_checks(store, candidate.files, list(candidate.checks), {}, store.uri).difference < 1e-5
    (line,) = store.run("run").read_lines("samples/model")
    return {**candidate.to_json(), "grid": line["image"]}


def test_mnist_is_read_whole() -> None:
    labels = np.frombuffer(_unpacked(DATA / "mnist" / "train-labels-idx1-ubyte.gz"), dtype=np.uint8)[8:]
    images = np.frombuffer(_unpacked(DATA / "mnist" / "train-images-idx3-ubyte.gz"), dtype=np.uint8)[16:]
    assert len(labels) == 60_000
    from trainers.data.images import read_images

    source = SOURCE.validate_python({**MNIST, "limit": None, "hold_out": 0.0})
    for number, image in enumerate(read_images(source, DATA, seed=0)):
        assert image.label == labels[number]
        if number % 20_000 == 7:
            there = images[number * 784 : (number + 1) * 784].reshape(28, 28, 1)
            np.testing.assert_array_equal(image.pixels_HWC, there)
    assert number == 59_999


def _unpacked(path: Path) -> bytes:
    import gzip

    return gzip.decompress(path.read_bytes())


FAMILIES: dict[str, dict[str, Any]] = {
    "vae": {**CONVNET, "latent": 4, "binarize": True},
    "gan": {**CONVNET, "latent": 4, "class_conditional": True},
    "ddpm": {**DDPM, "class_conditional": True},
}


@pytest.mark.parametrize("family", tiered(FAMILIES, ["vae"]))
def test_mnist_trains_and_draws(tmp_path: Path, family: str) -> None:
    found = train(tmp_path, DATA, {"family": family, **FAMILIES[family]}, MNIST)
    assert found["metrics"]["data"]["height"] == 28
    assert found["grid"].startswith("data:image/png;base64,")


def test_rgba_tiles_train_and_draw(tmp_path: Path) -> None:
    assert train(tmp_path, DATA, {"family": "gan", **CONVNET}, TILES)["metrics"]["data"]["channels"] == 4
    over_black = {**TILES, "channels": 3}
    gaussian = {"family": "vae", **CONVNET, "latent": 4, "likelihood": "gaussian"}
    assert train(tmp_path / "rgb", DATA, gaussian, over_black)["metrics"]["data"]["channels"] == 3


def test_omniglot_s_png_files_train_and_draw(tmp_path: Path) -> None:
    with zipfile.ZipFile(DATA / "omniglot" / "omniglot_small.zip") as archive:
        wanted = [name for name in archive.namelist() if name.endswith(".png")][:120]
        archive.extractall(tmp_path / "omniglot", wanted)
    data = {"source": "image-folder", "path": "omniglot", "size": 28, "channels": 1, "hold_out": 0.1}
    store = Store.open(str(tmp_path / "store"))
    dataset = materialise(DataRequest(SOURCE.validate_python(data), tmp_path, Images(), 0), store)
    assert dataset.shape == (1, 28, 28)
    assert set(dataset.classes) == {name.split("/")[0] for name in wanted}
    train(tmp_path, tmp_path, {"family": "vae", **CONVNET, "latent": 4}, data)
