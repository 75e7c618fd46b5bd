"""Whatever ends the driver, ten seconds later nothing of an embedded Ray is left: process, file, shared memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.serial

DRIVER = Path(__file__).with_name("driver.py")
PROJECT = Path(__file__).resolve().parents[3]
DEADLINE_S = 10.0


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short folder: Ray's sockets lie under it."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """The process under test, and what belongs to it."""

    def __init__(self, moment: str, temporary: Path, logs: Path) -> None:
        self.temporary = temporary
        self.mark = f"NOTHING_LEFT={temporary.name}"
        key, _, value = self.mark.partition("=")
        environment = {
            **os.environ,
            "TMPDIR": str(temporary),
            "HOME": str(temporary),
            key: value,
            "PYTHONPATH": str(PROJECT),
        }
        # A user's folders with the names of our packages must not be imported, by Ray's workers neither.
        for package in ("cluster", "recipes", "launch"):
            (logs / package).mkdir()
            (logs / package / "__init__.py").write_text("raise ImportError('imported from the working folder')")
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), moment, str(logs)],
            env=environment,
            cwd=logs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: list[dict[str, object]] = []

    def wait_for(self, moment: str, count: int = 1) -> None:
        """Until the driver has said so that many times."""
        assert self.process.stdout is not None
        while sum(line["at"] == moment for line in self.said) < count:
            line = self.process.stdout.readline()
            assert line, f"the driver ended before {moment}: {self.process.stderr and self.process.stderr.read()}"
            self.said.append(json.loads(line))

    def left(self) -> dict[str, list[str]]:
        """Processes and files that should be gone."""
        processes = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == self.process.pid:
                continue
            try:
                handles = [os.readlink(handle) for handle in (folder / "fd").iterdir()]
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in environment or any(handle.startswith(f"{self.temporary}/") for handle in handles):
                processes.append(f"{folder.name} {command[:80]!r}")
        files = [os.path.join(where, name) for where, *found in os.walk(self.temporary) for name in found[0] + found[1]]
        litter = [str(line["path"]) for line in self.said if "path" in line]
        return {
            "processes": processes,
            "files": files,
            "shared memory": [path for path in litter if Path(path).exists()],
        }

    def assert_nothing_left(self) -> float:
        """Seconds until everything was gone."""
        started = time.monotonic()
        while time.monotonic() - started < DEADLINE_S:
            if not any(self.left().values()):
                return time.monotonic() - started
            time.sleep(0.1)
        raise AssertionError(f"left after {DEADLINE_S:g} s: {self.left()}")

    def close(self) -> None:
        """Ends what a failed test left."""
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize(
    ("moment", "ending", "after_s"),
    [
        pytest.param("start", signal.SIGKILL, 0.3, marks=pytest.mark.long),
        ("start", signal.SIGKILL, 1.2),
        pytest.param("imports", signal.SIGKILL, 0.1, marks=pytest.mark.long),
        ("litter", signal.SIGKILL, 0.2),
        pytest.param("litter", signal.SIGTERM, 0.2, marks=pytest.mark.long),
        ("litter", signal.SIGINT, 0.2),
        ("exception", None, 0.0),
        ("normal", None, 0.0),
        pytest.param("raylet", None, 0.0, marks=pytest.mark.long),
        ("gcs_server", None, 0.0),
    ],
)
def test_nothing_is_left(
    moment: str, ending: signal.Signals | None, after_s: float, temporary: Path, tmp_path: Path
) -> None:
    """Kills at several moments of a driver's life, and its own ways to end."""
    driver = Driver(moment, temporary, tmp_path)
    try:
        match moment:
            case "start":
                driver.wait_for("begin")
            case "imports":
                driver.wait_for("group")
            case "litter":
                driver.wait_for("litter", count=2)
        time.sleep(after_s)
        if ending is not None:
            os.kill(driver.process.pid, ending)
        output, errors = driver.process.communicate(timeout=60)
        took_s = driver.assert_nothing_left()
    finally:
        driver.close()
    print(f"{moment} {ending}: gone after {took_s:.1f} s")
    noise = [line for line in errors.splitlines() if line and "Traceback" not in line]
    if moment == "normal":
        assert driver.process.returncode == 0
        assert not noise, f"the terminal got {noise}"
        assert '"end"' in output
    elif moment in ("raylet", "gcs_server"):
        (failed,) = [said for line in output.splitlines() if (said := json.loads(line))["at"] == "failed"]
        assert "resume" in failed["message"]
        assert failed["seconds"] < 5
    elif moment == "exception":
        assert noise[-1] == "RuntimeError: a driver's own mistake"
        assert not [line for line in noise if "ray" in line.lower() and "File" not in line]
