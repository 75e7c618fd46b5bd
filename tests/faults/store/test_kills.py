"""Writers killed at random moments: no ref names half a commit (BAD-REF), no acknowledged one is lost (ACK-LOSS)."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainers.store.manifest import Layout, StateManifest
from trainers.store.store import Fenced, Store

WRITER = Path(__file__).with_name("writer.py")
ROOT = Path(__file__).parents[3]
ROUNDS = 20
"""Two writers are killed in each."""


class Writer:
    """A writer process and what it acknowledged."""

    def __init__(self, uri: Path, number: int, seed: int) -> None:
        self.errors = uri.parent / f"errors-{number}-{seed}"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WRITER), str(uri), str(number), str(seed)],
                stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.number = number
        self.acknowledged: list[list[str]] = []
        self.ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def end(self) -> None:
        """Kill it unless it ended, and take its last words."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.acknowledged.append(line.split())
                self.ready.set()
        self.ready.set()


@pytest.fixture
def writers() -> Iterator[list[Writer]]:
    started: list[Writer] = []
    yield started
    for writer in started:
        writer.end()


def check(uri: Path, killed: list[Writer]) -> int:
    """Compare the store with what was acknowledged; returns the number of acknowledgements."""
    store = Store.open(str(uri))
    assert store.verify().damage == []
    count = 0
    for writer in killed:
        run = f"run-{writer.number}"
        lines = {(line["lease"], line["number"]) for line in store.run(run).read_lines("journal")}
        last_step = 0
        for what, *rest in writer.acknowledged:
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


def test_killed_writers_lose_nothing(tmp_path: Path, writers: list[Writer]) -> None:
    uri = tmp_path / "store"
    chooser = random.Random(20)
    kills = acknowledged = 0
    for number in range(ROUNDS):
        pair = [Writer(uri, index, number) for index in range(2)]
        writers[:] = pair
        for writer in pair:
            assert writer.ready.wait(60)
        for writer in pair:
            time.sleep(chooser.uniform(0, 0.12))
            writer.end()
            kills += 1
        acknowledged += check(uri, pair)
    print(f"{kills} kills, {acknowledged} acknowledged commits: BAD-REF 0, ACK-LOSS 0")
    assert kills == 2 * ROUNDS
    assert acknowledged > kills
    # What retention dropped is gone: two kept states, and at most what each kill left half done.
    states = len(Store.open(str(uri))._files.names("refs/states/run-0/base"))
    assert states <= 2 + ROUNDS + 1


def test_a_frozen_writer_is_refused_when_it_wakes(tmp_path: Path, writers: list[Writer]) -> None:
    uri = tmp_path / "store"
    for number in range(5):
        writer = Writer(uri, number, number)
        writers.append(writer)
        assert writer.ready.wait(60)
        time.sleep(0.03 * number)
        writer.process.send_signal(signal.SIGSTOP)
        store = Store.open(str(uri))
        run = f"run-{number}"
        lease = store.take_lease(run, "base")
        before = store.latest_state(run, "base")
        writer.process.send_signal(signal.SIGCONT)
        assert writer.process.wait(60) != 0
        assert "was superseded by lease" in writer.errors.read_text()
        after = store.latest_state(run, "base")
        assert after == before
        manifest = StateManifest(
            run=run, stage="base", fingerprint="ab" * 32, step=1, lease=lease,
            layout=Layout(workers=1, micro_batch=1, accumulation=1),
        )  # fmt: skip
        store.commit_state(manifest, lease)
        assert store.latest_state(run, "base") == manifest


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
    log = store._states("run", "base")._refs
    leases_so_far = 0
    for number in log.numbers():
        record = log.read(number)
        if "lease" in record:
            leases_so_far = max(leases_so_far, record["lease"])
        else:
            manifest = store._read_manifest(record)
            assert isinstance(manifest, StateManifest)
            assert manifest.lease >= leases_so_far, "a stale writer published after a higher lease's barrier"
    assert refused
    assert committed
