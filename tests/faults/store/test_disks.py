"""Real disks: a power cut on a loop-mounted ext4, a tmpfs that is full; both need root and are skipped without."""

import contextlib
import filecmp
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import StoreDamaged
from tests.faults.store.children import Nursery
from trainers.store.inspection import verify
from trainers.store.manifest import sha256_hex
from trainers.store.place import StoreFull
from trainers.store.store import Store

IMAGE_BYTES = 48 << 20


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


# Power cut


def lost(store: Store, acknowledged: list[list[str]], number: int) -> list[str]:
    """What was acknowledged and is not there, and what is damaged."""
    wrong = [f"damaged: {item.path}: {item.problem}" for item in verify(store).damage]
    last_step = 0
    lines = {(line["lease"], line["number"]) for line in store.run(f"run-{number}").read_lines("journal")}
    for what, *rest in acknowledged:
        try:
            if what == "artifact" and store.find_artifact(rest[0]) is None:
                wrong.append(f"artifact {rest[0][:12]}")
        except StoreDamaged as error:
            wrong.append(str(error))
        if what == "line" and (int(rest[0]), int(rest[1])) not in lines:
            wrong.append(f"line {rest}")
        if what == "state":
            last_step = int(rest[0])
    try:
        latest = store.latest_state(f"run-{number}", "base")
    except StoreDamaged as error:
        return [*wrong, str(error)]
    if (latest.step if latest else 0) < last_step:
        wrong.append(f"state {last_step}")
    return wrong


def copy_moment(image: Path, copy: Path) -> None:
    """Copy a disk's image as it is at one moment, like a power cut; the kernel may write while the copy is made.

    A copy that equals the image after it was made holds what the image held at that moment.
    """
    for _ in range(50):
        command("cp", "--sparse=always", str(image), str(copy))
        if filecmp.cmp(image, copy, shallow=False):
            return
    raise AssertionError("the disk never stood still for as long as a copy takes")


def cut_power(
    nursery: Nursery, mount: Callable[..., Path], tmp_path: Path, num_cuts: int, no_sync: bool
) -> tuple[int, list[str]]:
    """Copy the disk's image while a writer works on it; what the copy holds is what a power cut would leave."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    command("mkfs.ext4", "-q", "-F", str(image))
    disk = mount("-o", "loop", str(image), name="disk")
    chooser = random.Random(4)
    wrong: list[str] = []
    promises = 0
    for number in range(num_cuts):
        writer = nursery.start("write", disk / "store", number=number, seed=number, no_sync=no_sync)
        writer.wait_acknowledged(chooser.randint(2, 8))
        time.sleep(chooser.uniform(0, 0.01))
        os.kill(writer.pid, signal.SIGSTOP)
        acknowledged = writer.acknowledged()
        copy = tmp_path / "copy.img"
        copy_moment(image, copy)
        writer.kill()
        left = mount("-o", "loop", str(copy), name=f"left-{number}")
        wrong += [f"cut {number}: {item}" for item in lost(Store.open(str(left / "store")), acknowledged, number)]
        promises += sum(words[0] != "ready" for words in acknowledged)
        command("umount", str(left))
        copy.unlink()
        if number % 20 == 19:
            shutil.rmtree(disk / "store")
    return promises, wrong


def run_cuts(nursery: Nursery, mount: Any, tmp_path: Path, num_cuts: int, say: Callable[[str], None]) -> None:
    promises, wrong = cut_power(nursery, mount, tmp_path, num_cuts, no_sync=False)
    say(f"{num_cuts} power cuts on ext4, {promises} acknowledged commits: lost {len(wrong)}")
    assert wrong == []


def test_a_power_cut_loses_nothing(
    nursery: Nursery, mount: Callable[..., Path], tmp_path: Path, say: Callable[[str], None]
) -> None:
    run_cuts(nursery, mount, tmp_path, 6, say)


def test_without_fsync_a_power_cut_loses_much(
    nursery: Nursery, mount: Callable[..., Path], tmp_path: Path, say: Callable[[str], None]
) -> None:
    """Negative control: the test above can see a loss."""
    promises, wrong = cut_power(nursery, mount, tmp_path, 3, no_sync=True)
    say(f"3 power cuts on ext4 without fsync, {promises} acknowledged commits: {len(wrong)} things lost or damaged")
    assert wrong


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_five_hundred_power_cuts_lose_nothing(
    nursery: Nursery, mount: Callable[..., Path], tmp_path: Path, say: Callable[[str], None]
) -> None:
    run_cuts(nursery, mount, tmp_path, 500, say)


# Full disk


def put(store: Store, seed: int, num_bytes: int) -> str:
    return store.objects.put_bytes(random.Random(seed).randbytes(num_bytes))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_a_full_disk_is_named_and_passes(mount: Callable[..., Path], share: float) -> None:
    """The disk fills after a share of the next object; what was committed stays, and the next write works again."""
    disk = mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", name="small")
    store = Store.open(str(disk / "store"))
    first = put(store, 1, 100_000)
    size = 2 << 20
    ballast = disk / "ballast"
    free = store.free_bytes()
    assert free is not None
    room = int(share * size) + (0 if share < 1 else 64 << 10)
    ballast.write_bytes(bytes(free - room))
    if share < 1:
        message = rf"cannot write an object: No space left .*needed {size} bytes, free \d+ bytes"
        with pytest.raises(StoreFull, match=message):
            put(store, 2, size)
        assert list(store.files.walk("tmp")) == []
        assert not store.objects.has(sha256_hex(random.Random(2).randbytes(size)), size)
    assert store.objects.get_bytes(first)
    said: list[str] = []
    store.wait_for_room(60, said.append)
    clearing = threading.Timer(0.5, ballast.unlink)
    clearing.start()
    second = put(store, 2, size)
    clearing.join()
    assert store.objects.get_bytes(second) == random.Random(2).randbytes(size)
    if share < 1:
        assert "waiting for room" in said[0]
        assert "room again" in said[-1]


def test_a_disk_without_inodes_is_named_and_passes(mount: Callable[..., Path]) -> None:
    disk = mount("-t", "tmpfs", "-o", "size=8m,nr_inodes=40", "tmpfs", name="few")
    store = Store.open(str(disk / "store"))
    first = put(store, 1, 1000)
    files = []
    while True:
        try:
            (disk / f"file-{len(files)}").touch()
        except OSError:
            break
        files.append(disk / f"file-{len(files)}")
    with pytest.raises(StoreFull, match=r"No space left .*needed 1000 bytes, free \d+ bytes"):
        put(store, 2, 1000)
    for path in files:
        path.unlink()
    assert store.objects.get_bytes(put(store, 2, 1000)) == random.Random(2).randbytes(1000)
    assert store.objects.get_bytes(first)


def test_training_goes_on_when_there_is_room_again(nursery: Nursery, mount: Callable[..., Path]) -> None:
    """A writer process on a disk that fills under it waits and goes on without a restart."""
    disk = mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", name="small")
    writer = nursery.start("write", disk / "store", seed=1, patience_s=60)
    writer.wait_acknowledged(3)
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    time.sleep(0.5)
    before = len(writer.acknowledged())
    time.sleep(0.5)
    assert len(writer.acknowledged()) <= before + 1, "nothing is committed on a full disk"
    assert writer.is_alive()
    os.unlink(ballast)
    writer.wait_acknowledged(before + 10)
    writer.kill()
    assert lost(Store.open(str(disk / "store")), writer.acknowledged(), 0) == []
