"""Writers killed at random moments: no ref names half a commit (BAD-REF), no acknowledged one is lost (ACK-LOSS)."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.store.children import Nursery
from trainers.store.inspection import verify
from trainers.store.manifest import Layout, StateManifest
from trainers.store.store import Fenced, Store

ROUNDS_PER_STORE = 25


def check(uri: Path, killed: Sequence[Any]) -> int:
    """Compare the store with what was acknowledged; returns the number of acknowledgements."""
    store = Store.open(str(uri))
    assert verify(store).damage == []
    count = 0
    for writer in killed:
        run = f"run-{writer.number}"
        lines = {(line["lease"], line["number"]) for line in store.run(run).read_lines("journal")}
        last_step = 0
        for what, *rest in writer.acknowledged():
            count += what != "ready"
            if what == "artifact":
                assert store.find_artifact(rest[0]) is not None
            elif what == "line":
                assert (int(rest[0]), int(rest[1])) in lines
            elif what == "state":
                last_step = int(rest[0])
        if last_step:
            latest = store.latest_state(run, "base")
            assert latest is not None
            assert latest.step >= last_step
    return count


def kill_writers(nursery: Nursery, folder: Path, num_kills: int, say: Callable[[str], None]) -> None:
    """Two writers at a time, each killed within moments of its first few calls, and the store checked each time."""
    chooser = random.Random(20)
    kills = acknowledged = 0
    uri = folder / "store-0"
    while kills < num_kills:
        if kills % (2 * ROUNDS_PER_STORE) == 0:
            uri = folder / f"store-{kills}"
        pair = [nursery.start("write", uri, number=index, seed=kills) for index in range(2)]
        for writer in pair:
            writer.wait_acknowledged(chooser.randint(1, 4))
        for writer in pair:
            time.sleep(chooser.uniform(0, 0.01))
            assert writer.is_alive(), writer.errors.read_text()
            writer.kill()
            kills += 1
        acknowledged += check(uri, pair)
    say(f"{kills} kills of two writers, {acknowledged} acknowledged commits: BAD-REF 0, ACK-LOSS 0")
    assert acknowledged > kills
    # What retention dropped is gone: two kept states, barriers, and at most what each kill left half done.
    states = len(Store.open(str(uri)).files.names("refs/states/run-0/base"))
    assert states <= 2 + 2 * ROUNDS_PER_STORE + 1


def test_killed_writers_lose_nothing(nursery: Nursery, tmp_path: Path, say: Callable[[str], None]) -> None:
    kill_writers(nursery, tmp_path, 60, say)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("num_kills", [2_000, 10_000])
def test_thousands_of_killed_writers_lose_nothing(
    nursery: Nursery, tmp_path: Path, say: Callable[[str], None], num_kills: int
) -> None:
    kill_writers(nursery, tmp_path, num_kills, say)


def freeze_writers(nursery: Nursery, uri: Path, count: int, say: Callable[[str], None]) -> None:
    """Stop a writer, take its lease over, and wake it: nothing of it is seen any more."""
    ghosts = 0
    for number in range(count):
        writer = nursery.start("write", uri, number=number, seed=number)
        writer.wait_acknowledged(1)
        time.sleep(random.Random(number).uniform(0, 0.12))
        os.kill(writer.pid, signal.SIGSTOP)
        store = Store.open(str(uri))
        run = f"run-{number}"
        lease = store.take_lease(run, "base")
        before = store.latest_state(run, "base")
        os.kill(writer.pid, signal.SIGCONT)
        writer.wait(60)
        assert "superseded by lease" in writer.errors.read_text()
        ghosts += store.latest_state(run, "base") != before
        manifest = StateManifest(
            run=run, stage="base", fingerprint="ab" * 32, step=1, lease=lease,
            layout=Layout(workers=1, micro_batch=1, accumulation=1),
        )  # fmt: skip
        store.commit_state(manifest, lease)
        assert store.latest_state(run, "base") == manifest
    say(f"{count} writers frozen and woken after their lease was taken over: GHOST {ghosts}")
    assert ghosts == 0


def test_a_frozen_writer_is_refused_when_it_wakes(nursery: Nursery, tmp_path: Path, say: Callable[[str], None]) -> None:
    freeze_writers(nursery, tmp_path / "store", 5, say)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_200_frozen_writers_are_refused_when_they_wake(
    nursery: Nursery, tmp_path: Path, say: Callable[[str], None]
) -> None:
    freeze_writers(nursery, tmp_path / "store", 200, say)


def test_many_holders_of_leases_fence_in_order(tmp_path: Path) -> None:
    """Eight threads take leases and commit at once: whoever commits held the highest lease at that moment."""
    refused: list[int] = []
    committed: list[int] = []

    def hold(index: int) -> None:
        store = Store.open(str(tmp_path))
        for _ in range(5):
            lease = store.take_lease("run", "base")
            for step in range(3):
                manifest = StateManifest(
                    run="run", stage="base", fingerprint="ab" * 32, step=lease * 100 + step, lease=lease,
                    layout=Layout(workers=1, micro_batch=1, accumulation=1),
                )  # fmt: skip
                try:
                    store.commit_state(manifest, lease)
                    committed.append(lease)
                except Fenced:
                    refused.append(lease)
                    break

    threads = [threading.Thread(target=hold, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store.open(str(tmp_path))
    log = store.states("run", "base")._refs
    leases_so_far = 0
    for number in log.numbers():
        record = log.read(number)
        if "lease" in record:
            leases_so_far = max(leases_so_far, record["lease"])
        else:
            manifest = store.read_ref("refs/states/run/base", record)
            assert isinstance(manifest, StateManifest)
            assert manifest.lease >= leases_so_far, "a stale writer published after a higher lease's barrier"
    assert refused
    assert committed
