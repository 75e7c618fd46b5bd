"""Image data sets: built once, memory-mapped, split into batches whose noise follows the position."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.errors import RequestError
from trainers.data.batches import BatchPlan, ImageBatch
from trainers.data.dataset import Dataset
from trainers.data.layouts.images import Images
from trainers.data.materialise import DataRequest, materialise
from trainers.data.sources.open import open_source
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from image_files import array_file, pixels, source

sys.path.pop(0)


def open_set(tmp_path: Path, **more: Any) -> Dataset:
    """Materialise the arrays."""
    request = DataRequest(source(**array_file(tmp_path), **more), tmp_path, Images(), 0)
    return materialise(request, Store.open(str(tmp_path / "store")))


def test_a_set_is_built_once_and_memory_mapped(tmp_path: Path) -> None:
    dataset, again = open_set(tmp_path), open_set(tmp_path)
    assert dataset.digest == again.digest
    assert isinstance(dataset.images_NCHW, np.memmap)
    assert dataset.shape == (1, 6, 6)
    assert dataset.classes == ("0", "1", "2")
    assert dataset.labels_N.tolist() == [0, 1, 2] * 3
    assert dataset.row_ids[4] == "a.npz:4"
    assert json.loads(json.dumps(dataset.report.to_json()))["rows_in"] == 9
    np.testing.assert_array_equal(dataset.images_NCHW[3].transpose(1, 2, 0), pixels(3))


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    keys = source(**array_file(tmp_path))
    before = open_source(keys, tmp_path).digest()
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    assert open_source(keys, tmp_path).digest() == before
    np.savez(tmp_path / "b.npz", images=np.zeros((9, 6, 6), dtype=np.uint8), kinds=np.arange(9))
    assert open_source(keys, tmp_path).digest() != before


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


def test_held_out_labels_are_numbered_as_the_training_s(tmp_path: Path) -> None:
    dataset = open_set(tmp_path)
    renumbered = dataset.with_classes(["2", "1", "0", "9"])
    assert renumbered.labels_N.tolist() == [2, 1, 0] * 3
    with pytest.raises(RequestError, match="labels 2 "):
        dataset.with_classes(["0", "1"])
