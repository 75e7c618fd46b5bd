"""A store that was written by the first version of each format is read today, and today's writer writes the same."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.checkpoint.find_state import find_state
from trainers.store.collection import collect
from trainers.store.inspection import lineage, verify
from trainers.store.manifest import Manifest, StoreFormat, canonical_json, manifest_bytes, sha256_hex
from trainers.store.objects import object_path
from trainers.store.state import TensorReader
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from write_golden import BASE, CHAT, DATA, MATRIX, MOMENT, RUN, main

sys.path.pop(0)

GOLDEN = Path(__file__).parent / "golden" / "format-1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    shutil.copytree(GOLDEN, tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


def test_everything_is_there(store: Store) -> None:
    assert verify(store).damage == []
    assert [item.stage for item in store.list_artifacts()] == ["base", "chat"]
    chat = store.resolve("best")
    assert (chat.fingerprint, chat.outcome.rule, chat.gate.passed) == (CHAT, "kl", False)
    assert [item.fingerprint for item in lineage(store, CHAT).ancestors] == [BASE]
    base = store.resolve(BASE[:8])
    assert (base.metrics["loss"], base.data, base.outcome.steps_done) == (2.5, {"data": DATA}, 10)
    assert (store.folder(base, "model") / "config.json").read_bytes() == b'{"model_type":"llama"}'
    dataset = store.find_dataset(DATA)
    assert dataset is not None
    assert store.objects.get_bytes(dataset.files["tokens.npy"].sha256) == b"tokens"
    assert store.runs() == [RUN]
    assert [line["loss"] for line in store.run(RUN).read_lines("metrics")] == [3.0, 2.0, 1.0]


def test_training_state_is_read(store: Store) -> None:
    state = store.latest_state(RUN, "base")
    assert state is not None
    assert (state.step, state.lease, state.values) == (2, 2, {"samples": 128, "kl_coef": 0.05})
    assert state.layout.accumulation == 8
    with TensorReader(store, state) as reader:
        assert torch.equal(reader.read("param", "w"), MATRIX)
        assert torch.equal(reader.read_range("param", "w", 3, 6), MATRIX.flatten()[3:6])
        assert torch.equal(reader.read("exp_avg_sq", "b"), MOMENT)
    assert store.take_lease(RUN, "base") == 3
    assert store.keep_states(RUN, "base", keep=1) == 1


def test_the_writer_writes_the_same(tmp_path: Path) -> None:
    main(str(tmp_path))

    def listing(root: Path) -> list[str]:
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    assert listing(tmp_path) == listing(GOLDEN)
    for name in listing(GOLDEN):
        ours, golden = (tmp_path / name).read_bytes(), (GOLDEN / name).read_bytes()
        if name.startswith(("refs/", "leases/")):
            records = [{**json.loads(data), "nonce": ""} for data in (ours, golden)]
            if name.startswith("refs/states/"):
                records[0].pop("step", None)  # the first version left it to the manifest
            ours, golden = map(canonical_json, records)
        assert ours == golden, name


def test_manifests_are_unchanged_by_reading_and_writing(store: Store) -> None:
    for manifest in (*store.list_artifacts(), store.latest_state(RUN, "base"), store.find_dataset(DATA)):
        assert manifest is not None
        assert store._files.size(object_path(sha256_hex(manifest_bytes(manifest)))) is not None


# A later version's records beside those of this one


def later(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Write a manifest as a later format might have it; returns what names it in a ref."""
    data = canonical_json({**json.loads(manifest_bytes(manifest)), "format": 2, "more": []})
    return {"manifest": store.objects.put_bytes(data), "bytes": len(data)}


def later_ref(store: Store, path: str) -> None:
    store.files.create(path, canonical_json({"format": 2, "names": ["what", "ever"]}))


def refuses(store: Store, call: Callable[[], object], path: str) -> None:
    """Older whole commits are there, and must not be used in place of the newest, nor that be set aside or replaced."""

    def listing() -> list[str]:
        return sorted(path for folder in ("refs", "leases", "quarantine", "gc") for path in store.files.walk(folder))

    before = listing()
    for ask in (call, lambda: collect(store, grace_s=0)):
        with pytest.raises(StoreFormat, match=rf"{path}.* format 2; .* format 1"):
            ask()
    assert listing() == before
    assert verify(store, set_aside=True).later == [ref for ref in before if ref.startswith(path)][-1:]
    assert verify(store).damage == []
    assert listing() == before


@pytest.mark.parametrize("part", ["manifest", "ref"])
def test_a_state_of_a_later_format_is_not_passed_over(store: Store, part: str) -> None:
    state, folder = store.latest_state(RUN, "base"), f"refs/states/{RUN}/base"
    assert state is not None
    if part == "manifest":
        store.states(RUN, "base")._refs.create(5, later(store, state))
    else:
        later_ref(store, f"{folder}/000005")
    refuses(store, lambda: store.latest_state(RUN, "base"), folder if part == "manifest" else f"{folder}/000005")
    refuses(store, lambda: store.keep_states(RUN, "base", keep=1), folder)
    refuses(store, lambda: find_state(store, RUN, "base", state.fingerprint), folder)


@pytest.mark.parametrize("part", ["manifest", "ref"])
def test_an_artifact_of_a_later_format_is_neither_passed_over_nor_made_again(
    store: Store, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat, folder = store.resolve(CHAT), f"refs/artifacts/{CHAT}"
    if part == "manifest":
        store._artifact_refs(CHAT).create(2, later(store, chat))
    else:
        later_ref(store, f"{folder}/000002")
    refuses(store, lambda: store.find_artifact(CHAT), folder)
    refuses(store, lambda: store.put_artifact(chat), folder)
    assert [item.stage for item in store.list_artifacts()] == ["base"]
    assert "format 2" in caplog.text


def test_a_name_and_a_pin_of_a_later_format_are_refused(store: Store) -> None:
    later_ref(store, "refs/names/best/000003")
    refuses(store, lambda: store.resolve("best"), "refs/names/best/000003")
    store.files.remove("refs/names/best/000003")
    store.pin(CHAT)
    later_ref(store, f"refs/pins/{CHAT}/000002")
    refuses(store, store.pins, f"refs/pins/{CHAT}/000002")
