"""A kill or an error at every system call that a store makes, injected by strace: no half commit, none lost.

The life in life.py runs once to count its calls; then once for each call with a fault there. The short form takes an
even sample of the points, the long form all of them.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.store.children import Child, Nursery
from trainers.store.inspection import verify
from trainers.store.manifest import sha256_hex
from trainers.store.objects import object_path
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
import life

sys.path.pop(0)

CALLS = (
    "openat", "write", "fsync", "link", "linkat", "unlink", "rename", "mkdir", "fchmod", "utimensat", "flock", "close",
)  # fmt: skip
"""Those that read are in test_failing_reads.py."""
FAULTS = {
    "kill": "signal=KILL",
    "EIO": "error=EIO",
    "ENOSPC": "error=ENOSPC",
    "EDQUOT": "error=EDQUOT",
    "EROFS": "error=EROFS",
    "short": "retval=1",
}
"""`short`: the call says that it wrote one byte, and wrote none; test_failing_operations.py has one that is true."""
NO_ERROR = {"close", "flock"}
"""Calls of which only the moment of a kill is of interest: the store does not act on their result."""
MUST_REFUSE = ("write", "fsync", "link", "linkat", "unlink", "rename", "fchmod", "utimensat")
"""A store never goes on after an error of one of these; an openat that makes a temporary file is another."""
SHORT_POINTS = 20
MOST_MISSED = 0.05
"""Share of points that a life may end before: names are hashes of times too, so it makes a folder more or less."""
LIVED_AGAIN = 6
"""In the short form the life is lived again after one fault in so many."""
DEADLINE_S = 60
ASIDE = sha256_hex(b"aside")
"""An artifact from before the life: pinned, and one of its objects moved aside by a collection that was killed."""


@pytest.fixture(autouse=True)
def _needs_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    probe = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()[:80]}")


@pytest.fixture
def places(place: str, tmp_path: Path) -> Iterator[Path]:
    """A folder for stores on the disk, or on memory."""
    if place == "disk":
        yield tmp_path
        return
    folder = Path("/dev/shm") / f"trainwright-{os.getpid()}-{time.time_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def put_aside(store: Path) -> None:
    """Make a store that a killed collection has left: an object that is needed lies in its trash."""
    opened = Store.open(str(store))
    made = life.artifact(opened, ASIDE, 1)
    opened.pin(ASIDE)
    path = object_path(made.files["model/0"].sha256)
    trash = store / "trash" / path
    trash.parent.mkdir(parents=True)
    os.rename(store / path, trash)


def trace(nursery: Nursery, store: Path, log: Path, inject: str | None = None) -> Any:
    """Run the life in a child with strace attached; returns the child, which has ended."""
    put_aside(store)
    child = nursery.start("live", store, waits=True)
    command = ["strace", "-f", "-y", "-p", str(child.pid), "-o", str(log), "-e", f"trace={','.join(CALLS)}"]
    tracer = subprocess.Popen(
        [*command, *(["-e", f"inject={inject}"] if inject else [])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{child.pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.go.touch()
        child.wait(DEADLINE_S)
        tracer.wait(DEADLINE_S)
    finally:
        tracer.kill()
        tracer.wait()
    return child


def check(store: Path, acknowledged: list[list[str]]) -> None:
    """What was acknowledged is there whole, and every ref names what is there."""
    opened = Store.open(str(store))
    said = collections.defaultdict(list)
    for what, value in acknowledged:
        said[what].append(value)
    if "collected" not in said:
        opened.files.recover()
    assert verify(opened).damage == []
    assert opened.find_artifact(ASIDE) is not None
    kept = sha256_hex(b"kept")
    if kept in said["artifact"]:
        assert opened.find_artifact(kept) is not None
        if "pin" in said and "unpinning" not in said:
            assert kept in opened.pins()
    latest = opened.latest_state("run", "base")
    assert (latest.step if latest else 0) >= max(map(int, said["state"]), default=0)
    assert len(list(opened.run("run").read_lines("journal"))) >= len(said["line"])
    assert opened.states("run", "base").highest_lease() >= max(map(int, said["lease"]), default=0)


def live_again(store: Path) -> None:
    """Live the life in this process, on what is there: every call works and keeps its promise."""
    acknowledged: list[list[str]] = []
    life.live(Store.open(str(store)), lambda *words: acknowledged.append([str(word) for word in words]))
    assert acknowledged[-1][0] == "done"
    check(store, acknowledged)
    assert list(Store.open(str(store)).files.walk("trash")) == []


def points(log: Path, fault: str) -> list[tuple[str, int]]:
    """Every (call, number) of a traced life; strace counts each call of each thread by itself."""
    of_thread = collections.Counter(re.findall(r"^(\d+)\s+(\w+)\(", log.read_text(), re.MULTILINE))
    counts = collections.Counter[str]()
    for (_, call), number in of_thread.items():
        counts[call] = max(counts[call], number)
    calls = [call for call in CALLS if fault == "kill" or call not in NO_ERROR]
    if fault == "short":
        calls = ["write"]
    return [(call, number) for call in calls for number in range(1, counts[call] + 1)]


def was_met(log: Path) -> bool:
    """Tell whether strace put a fault into the life."""
    return "(INJECTED)" in log.read_text()


def check_refusal(store: Path, child: Child, log: Path) -> None:
    """An error of a call that writes ends in a refusal; what could not be synced is neither synced again nor linked."""
    lines = log.read_text().splitlines()
    injected = [index for index, line in enumerate(lines) if line.endswith("(INJECTED)")]
    for at in injected:
        call, failed = lines[at].split(maxsplit=1)[1].split("(", 1)[0], lines[at]
        if call not in MUST_REFUSE and not (call == "openat" and "O_CREAT" in failed):
            continue
        assert str(store) in failed or f"<{store.parent}>" in failed, f"the fault met another place: {failed}"
        assert child.errors.exists(), f"the store went on after {failed}"
        last = child.errors.read_text().strip().splitlines()[-1]
        assert re.match(r"(recipes\.errors\.CapacityError|trainers\.store\.place\.StoreFull): store ", last), last
        if call == "fsync":
            (path,) = re.findall(r"<(.*)>", failed)
            again = [text for text in lines[at + 1 :] if path in text and re.search(r" (fsync|link|linkat)\(", text)]
            assert again == [], f"{path} was not given up: {again}"


def run_points(
    nursery: Nursery, places: Path, tmp_path: Path, fault: str, most: int | None, say: Callable[[str], None]
) -> None:
    log = tmp_path / "trace"
    whole = trace(nursery, places / "whole", log)
    assert whole.acknowledged()[-1][0] == "done", whole.errors.read_text()
    check(places / "whole", whole.acknowledged())
    assert re.search(r" linkat\(", log.read_text()), "nothing was put back from the trash"
    found = points(log, fault)
    chosen = found if most is None else found[:: max(1, -(-len(found) // most))]
    ended, missed = collections.Counter[str](), list[tuple[str, int]]()
    for index, (call, number) in enumerate(chosen):
        store = places / f"store-{index}"
        child = trace(nursery, store, log, f"{call}:{FAULTS[fault]}:when={number}")
        done = bool(child.acknowledged()) and child.acknowledged()[-1][0] == "done"
        ended["went on" if done else "killed" if not child.errors.exists() else "refused"] += 1
        if child.errors.exists():
            last = child.errors.read_text().strip().splitlines()[-1]
            # Errors of writing mean nothing to a reader; one that the disk gives to both has to be named.
            bare = "PermissionError: " if fault == "EIO" else "OSError: |PermissionError: "
            assert re.match(rf"(recipes\.errors|trainers\.store\.\w+)\.\w+: |{bare}", last), last
        if fault not in ("kill", "short"):
            if not was_met(log):
                assert done, f"{call} {number} was not met, and the life did not end"
                missed.append((call, number))
            check_refusal(store, child, log)
        check(store, child.acknowledged())
        if most is None or index % LIVED_AGAIN == 0:
            live_again(store)
        shutil.rmtree(store)
    where = f"{len(chosen)} of {len(found)} system calls"
    say(f"{fault} on {places.parts[1]}: {where}, {dict(ended)}, not met {len(missed)}: BAD-REF 0, ACK-LOSS 0")
    assert len(missed) <= MOST_MISSED * len(chosen), missed
    assert len(found) > (10 if fault == "short" else 100)
    assert ended["killed"] > 0 if fault == "kill" else ended["refused"] > 0


@pytest.mark.parametrize(
    ("fault", "place"), [("kill", "disk"), ("EIO", "disk"), ("ENOSPC", "tmpfs"), ("short", "tmpfs")]
)
def test_a_fault_at_sampled_system_calls(
    nursery: Nursery, places: Path, tmp_path: Path, say: Callable[[str], None], fault: str
) -> None:
    run_points(nursery, places, tmp_path, fault, SHORT_POINTS, say)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("place", ["disk", "tmpfs"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_system_call(
    nursery: Nursery, places: Path, tmp_path: Path, say: Callable[[str], None], fault: str
) -> None:
    run_points(nursery, places, tmp_path, fault, None, say)
