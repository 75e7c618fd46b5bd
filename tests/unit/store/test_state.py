"""Tensors of a training state: any pieces in, any ranges out; retention removes what it may and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from recipes.errors import StoreDamaged
from trainers.store.inspection import verify
from trainers.store.manifest import (
    ArtifactManifest,
    Layout,
    Slice,
    StateManifest,
    TensorEntry,
    files_digest,
    merge_entries,
)
from trainers.store.objects import object_path
from trainers.store.state import TensorReader, write_tensors
from trainers.store.store import Store

LAYOUT = Layout(workers=1, micro_batch=1, accumulation=1)
WHERE = {"run": "run", "stage": "base", "lease": 1, "step": 1}


@dataclass(frozen=True)
class Run:
    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def whole(name: str, tensor: Tensor, group: str = "param") -> Run:
    return Run(group, name, tuple(tensor.shape), 0, tensor.flatten())


def manifest_of(tensors: dict[str, list[TensorEntry]], step: int = 1, lease: int = 1) -> StateManifest:
    return StateManifest(
        run="run", stage="base", fingerprint="ab" * 32, step=step, lease=lease, tensors=tensors, layout=LAYOUT
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(str(tmp_path_factory.mktemp("store")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_bit_for_bit(store: Store, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(5, 7).mul(10).to(dtype),
        "scalar": torch.tensor(3.0).to(dtype),
        "empty": torch.empty(0, 4).to(dtype),
        "view": torch.randn(8, 6).mul(10).to(dtype).t()[1:4],
    }
    entries = write_tensors(store, [whole(name, tensor) for name, tensor in tensors.items()], **WHERE)
    with TensorReader(store, manifest_of(entries)) as reader:
        assert reader.names("param") == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(reader.read("param", name), tensor)
            assert reader.read("param", name).dtype == dtype
        with pytest.raises(StoreDamaged, match="no tensor param:other"):
            reader.read("param", "other")


@given(st.data())
def test_any_cut_is_readable_by_any_range(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 60))
    cuts = sorted(data.draw(st.sets(st.integers(1, size), max_size=4)) | {0, size})
    ranks = data.draw(st.integers(1, 3))
    tensor = torch.arange(size, dtype=torch.float32).reshape(1, size)
    store = Store.open(f"memory://{np.random.default_rng().integers(2**62)}")
    parts = []
    for rank in range(ranks):
        pieces = [
            Run("exp_avg", "w", (1, size), start, tensor.flatten()[start:stop])
            for index, (start, stop) in enumerate(pairwise(cuts))
            if index % ranks == rank
        ]
        parts.append(write_tensors(store, pieces, **WHERE))
    manifest = manifest_of(merge_entries(parts))
    with TensorReader(store, manifest) as reader:
        assert torch.equal(reader.read("exp_avg", "w"), tensor)
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        assert torch.equal(reader.read_range("exp_avg", "w", start, stop), tensor.flatten()[start:stop])


def test_boxes_are_readable(store: Store) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    slices = []
    for column in (0, 2):
        box = tensor[:, column : column + 2]
        written = write_tensors(store, [whole(f"box{column}", box)], **WHERE)["param"][0].slices[0]
        slices.append(Slice(start=[0, column], shape=[3, 2], object=written.object, key=written.key))
    entry = TensorEntry(name="w", shape=[3, 4], dtype="F32", slices=slices)
    # The objects hold the boxes flattened; a box must be stored in its own shape.
    with (
        TensorReader(store, manifest_of({"param": [entry]})) as reader,
        pytest.raises(StoreDamaged, match=r"holds w as F32 \[6\], not F32 \[3, 2\]"),
    ):
        reader.read("param", "w")
    from safetensors.torch import save

    for column, piece in zip((0, 2), slices, strict=True):
        data = save({"box": tensor[:, column : column + 2].contiguous()})
        sha = store.objects.put_bytes(data)
        boxed = piece.model_copy(
            update={"object": piece.object.model_copy(update={"sha256": sha, "bytes": len(data)}), "key": "box"}
        )
        slices[slices.index(piece)] = boxed
    entry = entry.model_copy(update={"slices": slices})
    with TensorReader(store, manifest_of({"param": [entry]})) as reader:
        assert torch.equal(reader.read("param", "w"), tensor)
        assert torch.equal(reader.read_range("param", "w", 3, 9), tensor.flatten()[3:9])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 4), (5, 10)], "9 of 10 elements"),
        ([(0, 6), (4, 10)], "12 of 10 elements"),
        ([(0, 5), (4, 9)], "not whole: element 4"),
        ([(1, 11)], "not whole: element 0"),
    ],
)
def test_a_state_with_a_hole_is_no_state(store: Store, pieces: list[tuple[int, int]], message: str) -> None:
    parts = [
        write_tensors(store, [Run("param", "w", (10,), start, torch.zeros(stop - start))], **WHERE)
        for start, stop in pieces
    ]
    with pytest.raises(ValueError, match=message):
        manifest_of(merge_entries(parts))


def test_ranks_that_disagree_are_refused(store: Store) -> None:
    one = write_tensors(store, [Run("param", "w", (10,), 0, torch.zeros(5))], **WHERE)
    other = write_tensors(store, [Run("param", "w", (11,), 5, torch.zeros(6))], **WHERE)
    with pytest.raises(ValueError, match="param:w is F32"):
        merge_entries([one, other])


def test_large_states_are_several_objects(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.store.state.OBJECT_BYTES", 1000)
    tensors = {f"w{index}": torch.full((100,), float(index)) for index in range(7)}

    def stream() -> Iterator[Run]:
        for name, tensor in tensors.items():
            yield whole(name, tensor)

    manifest = manifest_of(write_tensors(store, stream(), **WHERE))
    assert len(list(manifest.objects())) == 3
    with TensorReader(store, manifest) as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read("param", name), tensor)


def test_objects_open_with_the_stock_library_and_name_their_owner(store: Store) -> None:
    entries = write_tensors(store, [whole("w", torch.ones(3))], run="run", stage="base", lease=4, step=9)
    piece = entries["param"][0].slices[0]
    with safe_open(store.objects.local_path(piece.object.sha256), framework="pt") as file:
        assert file.metadata() == {"owner": "run/base/4/9"}
        assert torch.equal(file.get_tensor(piece.key), torch.ones(3))


def commit(store: Store, step: int, lease: int, values: Tensor, run: str = "run") -> StateManifest:
    entries = write_tensors(store, [whole("w", values)], run=run, stage="base", lease=lease, step=step)
    manifest = manifest_of(entries, step, lease).model_copy(update={"run": run})
    store.commit_state(manifest, lease)
    return manifest


def count(store: Store) -> int:
    return sum(1 for _ in store._files.walk("objects"))


def test_disk_use_of_a_run_is_bounded(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    lease = store.take_lease("run", "base")
    for step in range(1, 30):
        commit(store, step, lease, torch.full((10,), float(step)))
        store.keep_states("run", "base", keep=2)
        assert count(store) <= 4, "two states are two manifests and two objects"
    latest = store.latest_state("run", "base")
    assert latest is not None
    with TensorReader(store, latest) as reader:
        assert reader.read("param", "w")[0] == 29


def test_equal_states_of_two_runs_do_not_lose_each_other(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    for run in ("one", "two"):
        lease = store.take_lease(run, "base")
        for step in range(1, 5):
            commit(store, step, lease, torch.full((10,), float(step)), run=run)
    assert store.keep_states("one", "base", keep=1) == 3
    assert verify(store).damage == []
    for run in ("one", "two"):
        assert store.latest_state(run, "base") is not None


def test_retention_spares_objects_that_are_not_the_states_own(tmp_path: Path) -> None:
    """A state that was made to name an artifact's file and another step's object: neither goes with it."""
    store = Store.open(str(tmp_path))
    lease = store.take_lease("run", "base")
    shared = store.objects.put_chunks([b"not a safetensors file at all"])
    files = {"model/weights": shared}
    store.put_artifact(
        ArtifactManifest(fingerprint="cd" * 32, digest=files_digest(files), kind="model", stage="base", files=files)
    )
    foreign = Slice(start=[0], shape=[1], object=shared, key="w")
    later = write_tensors(store, [whole("later", torch.ones(1))], run="run", stage="base", lease=lease, step=9)
    entries = {"param": [TensorEntry(name="w", shape=[1], dtype="F32", slices=[foreign])], "exp_avg": later["param"]}
    forged = manifest_of(entries, step=1, lease=lease)
    with pytest.raises(StoreDamaged, match="is wrong about 2 of its objects"):
        store.commit_state(forged, lease)
    store.states("run", "base")._refs.append(store._put_manifest(forged))
    for step in (2, 3):
        commit(store, step, lease, torch.zeros(4))
    assert store.keep_states("run", "base", keep=1) == 2
    assert verify(store).damage == []
    assert store.find_artifact("cd" * 32) is not None
    assert store.objects.missing([later["param"][0].slices[0].object]) == []


def test_nothing_is_dropped_before_the_newest_verifies(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    lease = store.take_lease("run", "base")
    states = [commit(store, step, lease, torch.full((10,), float(step))) for step in (1, 2, 3)]
    newest = tmp_path / object_path(next(states[-1].objects()).sha256)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.chmod(0o644)
    newest.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"another hash|expected"):
        Store.open(str(tmp_path)).keep_states("run", "base", keep=1)
    assert len(store._files.names("refs/states/run/base")) == 4
    for hashed, step in ((False, 3), (True, 2), (False, 2)):  # found damaged, it is set aside
        found = Store.open(str(tmp_path)).latest_state("run", "base", hashed=hashed)
        assert found is not None
        assert found.step == step
    newest.unlink()
    assert Store.open(str(tmp_path)).keep_states("run", "base", keep=2) == 0
    latest = Store.open(str(tmp_path)).latest_state("run", "base")
    assert latest == states[1]
