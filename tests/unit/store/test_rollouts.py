"""Rollouts in the store: an iteration is there once, the newest draw of it counts, retention, collection, fencing."""

from pathlib import Path

import pytest

from trainers.store.collection import Keep, collect
from trainers.store.inspection import verify
from trainers.store.manifest import Layout, RolloutsManifest
from trainers.store.store import Fenced, Store


def put(store: Store, lease: int, iteration: int, data: bytes, run: str = "run") -> RolloutsManifest:
    manifest = RolloutsManifest(
        run=run,
        stage="policy",
        fingerprint="f" * 64,
        iteration=iteration,
        step=2 * iteration,
        files={"samples.safetensors": store.objects.put_chunks([data])},
        layout=Layout(workers=1, micro_batch=4, accumulation=1),
    )
    return store.put_rollouts(manifest, lease)


def refs(store: Store) -> list[str]:
    return sorted(path.removeprefix("refs/rollouts/") for path in store.files.walk("refs/rollouts"))


def test_an_iteration_that_is_drawn_again_is_there_once(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    first = store.take_lease("run", "policy")
    for iteration in range(3):
        put(store, first, iteration, b"%d" % iteration)
    second = store.take_lease("run", "policy")
    for iteration in (1, 2, 3):
        put(store, second, iteration, b"%d" % iteration)
    assert refs(store) == [f"run/policy/00000{iteration}/000001" for iteration in range(4)]
    assert store.list_rollouts("run", "policy") == [0, 1, 2, 3]
    with pytest.raises(Fenced):
        put(store, first, 3, b"late")
    other = put(store, second, 3, b"by two workers")
    assert store.find_rollouts("run", "policy", 3) == other
    assert store.find_rollouts("run", "policy", 4) is None
    assert verify(store).damage == []


def test_what_is_dropped_or_of_a_dropped_run_is_collected(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    for run in ("run", "other"):
        lease = store.take_lease(run, "policy")
        for iteration in range(3):
            put(store, lease, iteration, b"%s %d" % (run.encode() if iteration else b"both", iteration), run)
    assert store.drop_rollouts("run", "policy", before=2) == 2
    assert store.list_rollouts("run", "policy") == [2]
    for _ in range(2):
        collect(store, grace_s=0)
    assert store.find_rollouts("other", "policy", 0) is not None  # shared with what `run` dropped
    for _ in range(3):
        collect(store, grace_s=0, keep=Keep([], ["run"]))
    assert refs(store) == ["run/policy/000002/000001"]
    kept = store.find_rollouts("run", "policy", 2)
    assert kept is not None
    assert store.objects.get_bytes(kept.files["samples.safetensors"].sha256) == b"run 2"
    assert verify(store).damage == []
