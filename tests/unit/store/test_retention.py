"""Whatever happens to a store, retention and collection leave the newest state that is whole, and what is pinned."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import StoreDamaged
from trainers.store import objects
from trainers.store.collection import Keep, collect
from trainers.store.commit_rules import owner_mark
from trainers.store.inspection import verify
from trainers.store.manifest import (
    ArtifactManifest,
    FileEntry,
    Layout,
    Parent,
    Slice,
    StateManifest,
    TensorEntry,
    files_digest,
    sha256_hex,
)
from trainers.store.objects import ObjectStore, object_path
from trainers.store.store import Store

OPERATIONS = (
    "save", "fail", "resume", "keep1", "keep2", "keep3", "damage newest", "damage older", "lose newest", "look", "pin",
    "collect",
)  # fmt: skip


class Life:
    """A store, in memory by default, and what of it must be there."""

    def __init__(self, uri: str | None = None) -> None:
        self.store = Store.open(uri or f"memory://{np.random.default_rng().integers(2**62)}")
        self.lease = self.store.take_lease("run", "base")
        self.step = 0
        self.artifacts: list[ArtifactManifest] = []
        """Pinned ones, each with the one before as its parent; the first one has no pin of its own."""

    def put_object(self) -> FileEntry:
        """Write a tensor of three bytes as the next state has it."""
        owner = owner_mark("run", "base", self.lease, self.step + 1)
        text = (
            f'{{"__metadata__":{{"owner":"{owner}"}},"w":{{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}}}'.encode()
        )
        return self.store.objects.put_chunks([len(text).to_bytes(8, "little"), text, b"abc"])

    def save(self) -> None:
        """Commit the next state."""
        piece = Slice(start=[0], shape=[3], object=self.put_object(), key="w")
        self.step += 1
        manifest = StateManifest(
            run="run", stage="base", fingerprint="ab" * 32, step=self.step, lease=self.lease,
            tensors={"param": [TensorEntry(name="w", shape=[3], dtype="U8", slices=[piece])]},
            layout=Layout(workers=1, micro_batch=1, accumulation=1),
        )  # fmt: skip
        self.store.commit_state(manifest, self.lease)

    def states(self) -> list[StateManifest]:
        """All whose refs are there, oldest first, whatever became of their objects."""
        log = self.store.states("run", "base")
        found = [log.manifest(number) for number in log._refs.numbers()]
        return [manifest for manifest in found if manifest is not None]

    def newest(self) -> StateManifest:
        """The state that was committed last."""
        return self.states()[-1]

    def whole(self) -> list[int]:
        """The steps of the states whose every byte is right."""

        def is_whole(manifest: StateManifest) -> bool:
            try:
                for entry in manifest.objects():
                    self.store.objects.check(entry)
            except StoreDamaged:
                return False
            return True

        return [manifest.step for manifest in self.states() if is_whole(manifest)]

    def damage(self, newest: bool, data: bytes | None) -> None:
        """Alter or remove the object of the newest state, or of the one before it."""
        states = self.states()
        if len(states) < (1 if newest else 2):
            return
        path = object_path(next(states[-1 if newest else -2].objects()).sha256)
        files = self.store.files
        local = files.local(path)
        if local is not None:
            local.chmod(0o644)
            local.write_bytes((data or b"") * local.stat().st_size)
            return
        size = files.size(path)
        if size is not None:
            files._fs.rm_file(files._full(path))  # type: ignore[attr-defined]
            if data is not None:
                files._fs.pipe_file(files._full(path), data * (size // len(data) + 1))  # type: ignore[attr-defined]
                files._fs.pipe_file(files._full(path), files.read(path)[:size])  # type: ignore[attr-defined]

    def pin(self) -> None:
        """Commit a child of the last artifact and pin it; what it was made from has to stay with it."""
        content = b"artifact %d" % len(self.artifacts)
        files = {"model/a": FileEntry(sha256=self.store.objects.put_bytes(content), bytes=len(content))}
        last = self.artifacts[-1] if self.artifacts else None
        parents = {} if last is None else {"init_from": Parent(fingerprint=last.fingerprint, digest=last.digest)}
        made = ArtifactManifest(
            fingerprint=sha256_hex(content), digest=files_digest(files), kind="model", stage="base", files=files,
            parents=parents,
        )  # fmt: skip
        self.artifacts.append(self.store.put_artifact(made).manifest)
        self.store.pin(made.fingerprint)
        if last is not None:
            self.store.unpin(last.fingerprint)

    def keep(self, keep: int) -> None:
        """Nothing goes unless the newest is whole; then as many whole ones stay as there were, or as were asked for."""
        before, refs = self.whole(), len(self.states())
        try:
            dropped = self.store.keep_states("run", "base", keep=keep)
        except StoreDamaged:
            assert (self.whole(), len(self.states())) == (before, refs), "something was dropped"
            return
        assert len(self.states()) == refs - dropped >= min(refs, keep)
        if dropped:
            assert self.whole() == before[-keep:], "damaged ones were counted among those that are kept"
        else:
            assert self.whole() == before

    def do(self, what: str) -> None:
        """Do one of the operations."""
        do: dict[str, Callable[[], object]] = {
            "save": self.save,
            "fail": self.put_object,
            "damage newest": lambda: self.damage(True, b"x"),
            "damage older": lambda: self.damage(False, b"x"),
            "lose newest": lambda: self.damage(True, None),
            "pin": self.pin,
            "collect": lambda: collect(self.store, grace_s=0, keep=Keep(set(), {"run"})),
            **{f"keep{keep}": lambda keep=keep: self.keep(keep) for keep in (1, 2, 3)},  # type: ignore[misc]
        }
        if what == "resume":
            self.lease = self.store.take_lease("run", "base")
        elif what != "look":
            do[what]()
        else:
            self.look()

    def look(self) -> None:
        """The newest whole state is found; a damaged newer one is set aside from now on."""
        whole = self.whole()
        try:
            latest = Store.open(self.store.uri).latest_state("run", "base")
        except StoreDamaged:
            assert self.states()
            assert whole == []
        else:
            assert [latest.step] == whole[-1:] if latest else not self.states()

    def check(self) -> None:
        """What is pinned, and all that it was made from, is whole."""
        found = {item.fingerprint: item for item in self.store.list_artifacts()}
        assert list(found.values()) == self.artifacts
        for manifest in self.artifacts:
            self.store.objects.check(manifest.files["model/a"])


@given(st.lists(st.sampled_from(OPERATIONS), max_size=20))
def test_the_newest_whole_state_and_what_is_pinned_survive_everything(steps: list[str]) -> None:
    life = Life()
    for what in steps:
        whole = life.whole()
        life.do(what)
        if what.startswith(("keep", "collect", "look", "fail", "resume", "pin")):
            assert life.whole()[-1:] == whole[-1:], what
        life.check()
    life.look()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["save", "fail", "resume", "keep1", "keep2", "keep3"]), max_size=14))
def test_retention_never_reduces_what_can_be_loaded_below_what_it_keeps(steps: list[str]) -> None:
    life, loadable = Life(), 0
    for what in steps:
        life.do(what)
        loadable = loadable + 1 if what == "save" else min(loadable, int(what[4:])) if "keep" in what else loadable
        assert len(life.whole()) == loadable
        assert verify(life.store).damage == []
        latest = life.store.latest_state("run", "base")
        assert (latest.step if latest else 0) == life.step


def test_a_share_is_verified_and_other_seeds_verify_the_rest() -> None:
    """Half of forty objects, chosen by the seed: the same ones again, others by another seed, all in the end."""
    life = Life()
    for _ in range(40):
        life.save()
    store = life.store
    life.damage(True, b"x")
    reports = [verify(store, share=0.5, seed=seed) for seed in range(12)]
    assert all(8 <= report.objects <= 32 for report in reports)
    assert reports[0] == verify(store, share=0.5, seed=0)
    caught = [bool(report.damage) for report in reports]
    assert any(caught), "the damaged object was never chosen"
    assert not all(caught), "the damaged object was always chosen: the share is not one of the objects"
    assert verify(store, share=1.0).objects == 40
    assert {ref for item in verify(store).damage for ref in item.refs} == {"refs/states/run/base/000041"}


@pytest.mark.parametrize("newest", ["altered", "missing"])
def test_retention_counts_whole_states_alone(newest: str) -> None:
    """A newest one that was set aside is not counted among those that are kept."""
    life = Life()
    for _ in range(4):
        life.save()
    life.damage(True, b"x" if newest == "altered" else None)
    life.look()
    assert life.store.keep_states("run", "base", keep=2) == 1
    assert life.whole() == [2, 3]


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("is_read_back", [True, False])
def test_a_damaged_one_in_the_middle_costs_no_loadable_one(
    tmp_path: Path, kind: str, is_read_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is set aside, the older whole one stays in its place, and the next whole one lets that go."""
    life = Life(str(tmp_path / "store") if kind == "folder" else None)
    for _ in range(2):
        life.save()
        assert life.store.keep_states("run", "base", keep=2, read_back=life.newest() if is_read_back else None) == 0
    life.damage(True, b"x")
    life.save()
    assert life.store.keep_states("run", "base", keep=2, read_back=life.newest() if is_read_back else None) == 0
    assert life.whole() == [1, 3]
    assert "000003 (step 2) is damaged" in caplog.text
    assert life.store.files.names("quarantine/refs/states/run/base") == ["000003"]
    life.save()
    assert life.store.keep_states("run", "base", keep=2, read_back=life.newest() if is_read_back else None) == 1
    assert life.whole() == [3, 4]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_read_back_says_nothing_of_a_newer_one(tmp_path: Path, keep: int) -> None:
    """A superseded writer is slow to read back; the newest state is another's, and damaged: nothing is dropped."""
    life = Life(str(tmp_path / "store"))
    life.save()
    life.save()
    old = life.newest()
    life.lease = life.store.take_lease("run", "base")
    life.save()
    life.damage(True, b"x")
    slow = Store.open(life.store.uri)
    with pytest.raises(StoreDamaged, match="hash"):
        slow.keep_states("run", "base", keep=keep, read_back=old)
    assert life.whole() == [1, 2]


def test_one_that_the_disk_does_not_give_stays_and_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be whole: it does not count while it cannot be read, and does as soon as it can."""
    life = Life(str(tmp_path / "store"))
    for _ in range(3):
        life.save()
    life.store = Store.open(life.store.uri)

    def stale(path: Path) -> FileEntry:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(objects, "hash_file", stale)
        assert life.store.keep_states("run", "base", keep=2, read_back=life.newest()) == 0
    assert "000003 (step 2) is not" in caplog.text
    assert life.store.files.names("quarantine/refs/states/run/base") == []
    assert life.whole() == [1, 2, 3]
    assert life.store.keep_states("run", "base", keep=2, read_back=life.newest()) == 1
    assert life.whole() == [2, 3]


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_was_read_back_is_not_read_again(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention after a save hashes nothing, but for states that an earlier process has left."""
    life = Life(str(tmp_path / "store") if kind == "folder" else None)
    life.save()
    life.save()
    checked: list[FileEntry] = []
    check = ObjectStore.check
    monkeypatch.setattr(ObjectStore, "check", lambda self, entry: (checked.append(entry), check(self, entry)))
    hash_file = objects.hash_file
    monkeypatch.setattr(objects, "hash_file", lambda path: (checked.append(path), hash_file(path))[1])
    life.store = Store.open(life.store.uri)
    for expected in (1, 0, 0):
        life.save()
        checked.clear()
        assert life.store.keep_states("run", "base", keep=2, read_back=life.newest()) == 1
        assert len({str(item) for item in checked}) == expected
