"""Altered, cut, swapped and missing files are never taken for good; of many writers of one file one wins."""

import errno
import itertools
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import StoreDamaged
from trainers.store.inspection import verify
from trainers.store.manifest import StoreFormat, sha256_hex
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from life import artifact, state

sys.path.pop(0)

Content = tuple[object, ...]


def load(root: Path) -> Content:
    """Everything that a user of the store gets to see of its newest artifact and state; raises for damage."""
    store = Store.open(str(root))
    made = store.find_artifact(sha256_hex(b"one"))
    latest = store.latest_state("run", "base")
    files = {} if made is None else {n: store.objects.local_path(e.sha256).read_bytes() for n, e in made.files.items()}
    pieces = [] if latest is None else [store.objects.get_bytes(entry.sha256) for entry in latest.objects()]
    return made, latest, tuple(sorted(files.items())), tuple(pieces)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, list[Content]]:
    """A store with an artifact and two states; and what may be loaded from it: as it is, and one step back."""
    root = tmp_path / "whole"
    store = Store.open(str(root))
    artifact(store, sha256_hex(b"one"), 2)
    lease = store.take_lease("run", "base")
    state(store, "run", "base", lease, 1, b"first" * 10)
    older = load(root)
    state(store, "run", "base", lease, 2, b"other" * 10)
    return root, [load(root), older]


def stored(root: Path) -> list[Path]:
    places = (root / name for name in ("objects", "refs"))
    return sorted(path for place in places for path in place.rglob("*") if path.is_file())


def alter(path: Path, data: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


def judge(root: Path, good: list[Content]) -> str:
    """What loading gave: the newest, an older one, or an error; anything else is a failure."""
    try:
        found = load(root)
    except (StoreDamaged, StoreFormat, FileNotFoundError):  # a bit may turn a ref's 1 into a 3
        return "refused"
    assert found[0] in (good[0][0], None), "an altered artifact was taken for good"
    assert (found[1], found[3]) in [(item[1], item[3]) for item in good] or found[1] is None
    assert found[2] in (good[0][2], ())
    return "newest" if found == good[0] else "older"


def test_every_byte_that_is_altered_is_noticed(
    whole: tuple[Path, list[Content]], tmp_path: Path, say: Callable[[str], None]
) -> None:
    """One bit in forty bytes of every object and in every seventh of every ref, whose nonce means nothing."""
    root, good = whole
    chooser = random.Random(9)
    seen: dict[str, int] = {}
    for path in stored(root):
        data = path.read_bytes()
        is_ref = path.is_relative_to(root / "refs")
        for at in range(0, len(data), 7 if is_ref else max(1, len(data) // 40)):
            altered = bytearray(data)
            altered[at] ^= 1 << chooser.randrange(8)
            alter(path, bytes(altered))
            verdict = judge(root, good)
            seen[verdict] = seen.get(verdict, 0) + 1
            if not is_ref:
                # What only the older state needs is not read for the newest, but seen by `verify`.
                assert verdict != "newest" or verify(Store.open(str(root))).damage, f"{path.relative_to(root)}: {at}"
            shutil.rmtree(root / "quarantine", ignore_errors=True)
        alter(path, data)
    assert judge(root, good) == "newest"
    say(f"{sum(seen.values())} flipped bits: {seen}; loaded as good: 0")


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_bit_that_is_altered_is_noticed(whole: tuple[Path, list[Content]], say: Callable[[str], None]) -> None:
    root, good = whole
    count = 0
    for path in stored(root):
        data = path.read_bytes()
        for at, bit in itertools.product(range(len(data)), range(8)):
            altered = bytearray(data)
            altered[at] ^= 1 << bit
            alter(path, bytes(altered))
            judge(root, good)
            shutil.rmtree(root / "quarantine", ignore_errors=True)
            count += 1
        alter(path, data)
    say(f"{count} flipped bits: loaded as good: 0")


def test_what_is_cut_swapped_or_missing_is_noticed(whole: tuple[Path, list[Content]]) -> None:
    root, good = whole
    paths = stored(root)
    for path in paths:
        data = path.read_bytes()
        for other in (None, b"", data[:-1], data[: len(data) // 2], data + b"\0"):
            alter(path, other)
            verdict = judge(root, good)
            # A ref that is gone is as if it had never been there; all else is noticed at loading or by `verify`.
            is_gone_ref = other is None and path.is_relative_to(root / "refs")
            is_noticed = verdict != "newest" or bool(verify(Store.open(str(root))).damage)
            assert is_noticed or is_gone_ref, f"{path.relative_to(root)} as {other!r}"
            shutil.rmtree(root / "quarantine", ignore_errors=True)
        alter(path, data)
    objects = [path for path in paths if path.is_relative_to(root / "objects")]
    for one, two in itertools.combinations(objects, 2):
        first, second = one.read_bytes(), two.read_bytes()
        alter(one, second)
        alter(two, first)
        assert judge(root, good) != "newest" or verify(Store.open(str(root))).damage
        shutil.rmtree(root / "quarantine", ignore_errors=True)
        alter(one, first)
        alter(two, second)
    assert judge(root, good) == "newest"


@pytest.mark.parametrize("what", ["shard", "manifest", "ref"])
def test_the_newest_whole_state_is_used_and_the_loss_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    root = tmp_path / "store"
    store = Store.open(str(root))
    lease = store.take_lease("run", "base")
    states = [state(store, "run", "base", lease, step, b"%d" % step * 10) for step in (10, 20, 30)]
    newest = root / "refs/states/run/base/000004"
    shard = next(states[-1].objects()).sha256
    manifest = store.states("run", "base")._refs.read(4)["manifest"]
    victim = {"shard": shard, "manifest": manifest}.get(what)
    alter(newest if victim is None else root / "objects" / victim[:2] / victim[2:], b"x" if what == "ref" else None)
    latest = Store.open(str(root)).latest_state("run", "base")
    assert latest == states[1]
    lost = "000004 (step unknown), steps lost: unknown" if what == "ref" else "000004 (step 30), 10 steps lost"
    assert "refs/states/run/base/000003 (step 20)" in caplog.text
    assert "refs/states/run/base/000004" in caplog.text
    assert lost in caplog.text
    assert newest.exists(), "the bad one is kept"
    note = root / "quarantine/refs/states/run/base/000004"
    assert '"problem"' in note.read_text()
    caplog.clear()
    assert Store.open(str(root)).latest_state("run", "base") == states[1]
    assert caplog.text == "", "it is told once"
    state(store, "run", "base", lease, 21, b"later" * 10)
    assert store.states("run", "base")._refs.highest() == 5, "its number stays taken"
    for number in (2, 3, 5):
        alter(root / f"refs/states/run/base/{number:06d}", b"x")
    with pytest.raises(StoreDamaged, match="refs/states/run/base/"):
        Store.open(str(root)).latest_state("run", "base")


@pytest.mark.parametrize("what", ["shard", "manifest", "ref"])
def test_what_the_disk_cannot_give_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """EIO at the first read of a file that is there and of the right size."""
    root = tmp_path / "store"
    store = Store.open(str(root))
    lease = store.take_lease("run", "base")
    states = [state(store, "run", "base", lease, step, b"%d" % step * 10) for step in (10, 20)]
    name = sha256_hex(b"one")
    made = [artifact(store, name, 1)]
    ref = "refs/states/run/base/000003"
    sha = {"shard": next(states[1].objects()).sha256, "manifest": store.states("run", "base")._refs.read(3)["manifest"]}
    bad = root / (f"objects/{sha[what][:2]}/{sha[what][2:]}" if what in sha else ref)
    real = Path.open

    def fail(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == bad:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    report = verify(Store.open(str(root)))
    assert all("cannot be read: Input/output error" in item.problem for item in report.damage)
    assert {damaged for item in report.damage for damaged in item.refs} == {ref}
    assert Store.open(str(root)).list_artifacts() == made
    if what == "shard":
        with pytest.raises(StoreDamaged, match="cannot be read"):
            store.keep_states("run", "base", keep=1)
    else:
        assert store.keep_states("run", "base", keep=1) == 0
    assert Store.open(str(root)).latest_state("run", "base") == states[0]
    assert f"{bad.relative_to(root)} cannot be read: Input/output error" in caplog.text


def test_an_object_that_the_disk_cannot_give_is_mended_by_putting_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(str(tmp_path))
    sha = store.objects.put_bytes(b"right")
    bad = tmp_path / f"objects/{sha[:2]}/{sha[2:]}"
    inode, real = bad.stat().st_ino, Path.open

    def fail(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == bad and self.stat().st_ino == inode:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(StoreDamaged, match="cannot be read"):
        store.objects.get_bytes(sha)
    assert store.objects.put_bytes(b"right") == sha
    assert store.objects.get_bytes(sha) == b"right"


# Races


def race(uris: list[str], rounds: int, create: Callable[[Store, int, int], bool]) -> None:
    """All writers create the same refs, one after the other: each round has one winner."""
    stores = [Store.open(uri) for uri in uris]
    wins: list[list[int]] = [[] for _ in stores]
    barrier = threading.Barrier(len(stores))

    def run(index: int) -> None:
        for number in range(1, rounds + 1):
            barrier.wait(60)
            if create(stores[index], index, number):
                wins[index].append(number)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*wins)) == list(range(1, rounds + 1))
    for index, won in enumerate(wins):
        for number in won:
            assert stores[0].files.read(f"refs/race/{number:06d}") == b"%d" % index


def create_ref(store: Store, index: int, number: int) -> bool:
    return store.files.create(f"refs/race/{number:06d}", b"%d" % index, durable=False)


def test_32_writers_have_one_winner(tmp_path: Path) -> None:
    race([str(tmp_path / "store")] * 32, 30, create_ref)
    assert list(Store.open(str(tmp_path / "store")).files.walk("tmp")) == []


@pytest.mark.long
def test_32_writers_have_one_winner_in_1000_rounds(tmp_path: Path) -> None:
    race([str(tmp_path / "store")] * 32, 1000, create_ref)
