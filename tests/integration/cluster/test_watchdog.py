"""The watchdog alone: whom it ends, whom it leaves alone, what it removes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import watchdog

pytestmark = pytest.mark.serial

MARK = "TRAINWRIGHT_SESSION=0123456789abcdef"
SHARED = Path(f"/dev/shm/trainwright-test-{os.getpid()}")
SLEEP = "import sys, time; {}; print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Ends what a test started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()
    SHARED.unlink(missing_ok=True)


def start(
    processes: list[subprocess.Popen[str]], code: str, title: str = "some tool", **environment: str
) -> subprocess.Popen[str]:
    """A process that has done what the code says and sleeps."""
    command = [sys.executable, "-c", SLEEP.format(code), title]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_it_ends_its_own_and_nobody_else(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """A reader in the folder is a passer-by, whatever it is called; a marked process and a writing agent are not."""
    folder = tmp_path / "tw-test"
    folder.mkdir()
    log = folder / "agent.log"
    log.touch()
    key, _, value = MARK.partition("=")
    parent = start(processes, "pass")
    reader = start(processes, f"held = open({str(log)!r})", "ray::reader")
    lister = start(processes, f"import os; held = os.open({str(folder)!r}, os.O_RDONLY)", "ray::lister")
    writer_elsewhere = start(processes, f"held = open({str(tmp_path / 'other')!r}, 'w')", "ray::other")
    editor = start(processes, f"held = open({str(log)!r}, 'a')", "editor")
    agent = start(processes, f"held = open({str(log)!r}, 'a')", "ray::DashboardAgent")
    mapping = (
        f"import mmap; f = open({str(SHARED)!r}, 'w+b'); f.write(b'x' * 4096); f.flush(); m = mmap.mmap(f.fileno(), 0)"
    )
    marked = start(processes, mapping, **{key: value})
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", watchdog.__file__, str(parent.pid), str(folder), MARK], stdin=subprocess.PIPE
    )
    time.sleep(0.3)
    assert guard.poll() is None
    assert marked.poll() is None
    parent.kill()
    parent.wait()
    assert guard.wait(10) == 0
    assert marked.wait(1) == -9
    assert agent.wait(1) == -9
    for process in (reader, lister, writer_elsewhere, editor):
        assert process.poll() is None, process.args
    assert not folder.exists()
    assert not SHARED.exists()
    assert guard.stdin is not None
    guard.stdin.close()


def test_done_is_enough(tmp_path: Path) -> None:
    """An orderly end: the parent says so, lives on, and the folder goes."""
    folder = tmp_path / "tw-test"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").touch()
    (folder / "link").symlink_to(tmp_path)
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", watchdog.__file__, str(os.getpid()), str(folder), MARK],
        stdin=subprocess.PIPE,
    )
    guard.communicate(b"12345\ndone\n", timeout=10)
    assert guard.returncode == 0
    assert not folder.exists()
    assert tmp_path.exists()
