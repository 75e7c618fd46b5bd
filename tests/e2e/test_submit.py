"""A recipe handed to a cluster of three raylets on this machine, with token authentication."""

import gzip
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.records.record import RunRecord
from tests.e2e.shell import Shell, SmokeRun
from trainers.store.store import Store

pytestmark = pytest.mark.serial

RAY = str(Path(sys.executable).with_name("ray"))
NUM_NODES = 3
WORKERS = ("--set", "cluster.workers=2", "--set", "cluster.gpus_per_worker=0")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Raylets:
    """Where the cluster is."""

    job_server: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    """A head and two more raylets of one CPU each; ended by the mark in their environment."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    mark = f"TRAINWRIGHT_RAYLETS={folder.name}"
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        mark.partition("=")[0]: folder.name,
    }
    port, dashboard = free_port(), free_port()
    common = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats"]
    head = [
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
    ]
    try:
        for number in range(NUM_NODES):
            place = head if number == 0 else [f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1"]
            done = subprocess.run(
                [RAY, "start", *place, *common],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        yield Raylets(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        end_marked(mark.encode())
        shutil.rmtree(folder, ignore_errors=True)


def end_marked(mark: bytes) -> None:
    """Kill every process whose environment holds the mark."""
    for _ in range(20):
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if mark in Path(f"/proc/{name}/environ").read_bytes():
                    os.kill(int(name), signal.SIGKILL)
                    found.append(name)
            except OSError:
                continue
        if not found:
            return
        time.sleep(0.1)


@pytest.fixture
def shell(raylets: Raylets, make_shell: Callable[..., Shell]) -> Shell:
    """Commands on an empty store, with the cluster's token."""
    return make_shell(**raylets.environment)


def digests(shell: Shell) -> dict[str, str]:
    """Digest of every artifact in a shell's store, by its stage."""
    return {made.stage: made.digest for made in Store.open(str(shell.store)).list_artifacts()}


def wait_for_end(shell: Shell, run: str) -> dict[str, Any]:
    """A run's status once it has ended; the record is read here, as a command every second would keep a core busy."""
    deadline = time.monotonic() + 500
    while True:
        summary = RunRecord.open(Store.open(str(shell.store)), run).summary()
        if summary.state not in ("submitted", "running"):
            (status,) = shell("status", run, "--json").json
            return dict(status)
        assert time.monotonic() < deadline, summary
        time.sleep(0.5)


@pytest.mark.long
def test_a_submitted_smoke_makes_what_a_run_makes(
    raylets: Raylets, shell: Shell, smoke_run: SmokeRun, quickstart: Path, say: Callable[[str], None]
) -> None:
    done = shell("submit", str(quickstart), "--smoke", *WORKERS, "--address", raylets.job_server)
    assert done.code == 0, done.err
    run = done.out.strip()
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}-[0-9a-f]{4}", run)
    say(f"submit answered after {done.seconds:.1f} s")
    assert wait_for_end(shell, run)["state"] == "completed", shell("logs", run).out
    assert digests(shell) == smoke_run.digests
    assert "job: " in shell("logs", run).out


OWN = """
name: own
cluster: {workers: 2, gpus_per_worker: 0}
stages:
  base:
    kind: pretrain
    architecture:
      {family: decoder, type: llama, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64,
       num_attention_heads: 2}
    tokenizer: {train: bpe, vocab_size: 320}
    data: {source: jsonl, files: ["data/*.jsonl"], hold_out: 0.2}
    train: {steps: 4, global_batch: 6, sequence_length: 32, optimizer: {lr: 1e-3}}
  chat:
    kind: finetune
    init_from: base
    data: {source: jsonl, files: [data/chats/chat.jsonl.gz]}
    train: {steps: 4, global_batch: 6, sequence_length: 64, optimizer: {lr: 1e-3}}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A recipe on one's own files."""
    data = tmp_path / "project" / "data"
    (data / "chats").mkdir(parents=True)
    for name in ("one", "two"):
        rows = [{"text": f"row {number} of file {name} has these words in it"} for number in range(40)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(data / "chats" / "chat.jsonl.gz", "wt") as file:
        for number in range(40):
            file.write(json.dumps({"prompt": f"what is {number}?", "completion": f"{number} is a number"}) + "\n")
    (tmp_path / "project" / "own.yaml").write_text(OWN)
    return tmp_path / "project" / "own.yaml"


def wait_for_workers(shell: Shell, run: str, expected: int) -> None:
    """Wait until the run's stage in progress was started with that many workers."""
    deadline = time.monotonic() + 120
    while True:
        record = RunRecord.open(Store.open(str(shell.store)), run)
        started = [event["workers"] for event in record.events() if event["event"] == "stage_started"]
        state = record.summary().state
        if state == "running" and started[-1:] == [expected]:
            return
        assert state in ("submitted", "running"), state
        assert time.monotonic() < deadline, (state, started)
        time.sleep(0.2)


def test_a_run_is_stopped_resumed_with_fewer_workers_and_makes_the_same_of_ones_own_files(
    raylets: Raylets, shell: Shell, own: Path, tmp_path: Path
) -> None:
    """All from the submitting machine. The cluster reads uploaded files from the store; what it made is found again on
    the files themselves, which are on every node, and is what a run on this machine makes."""
    more = ("--set", f"cluster.workers={NUM_NODES}")
    submitted = shell("submit", str(own), "--upload", *more, "--address", raylets.job_server)
    assert submitted.code == 0, submitted.err
    assert "3 data files (0.0 MiB) uploaded to" in submitted.err
    away = own.parent.rename(own.parent.with_name("away"))
    run = submitted.out.strip()
    wait_for_workers(shell, run, NUM_NODES)
    stopped = shell("stop", run)
    assert stopped.code == 0, stopped.err
    assert stopped.out.strip() == f"{run}: stopped"
    refused = shell("resume", run, "--set", "seed=7")
    assert (refused.code, "seed: 0 in the run, 7 at present" in refused.err) == (2, True)
    resumed = shell("resume", run, "--set", "cluster.workers=2")
    assert resumed.code == 0, resumed.err
    wait_for_workers(shell, run, 2)
    assert wait_for_end(shell, run)["state"] == "completed", shell("logs", run).out
    away.rename(own.parent)
    here = Shell(tmp_path, tmp_path / "here")
    with ThreadPoolExecutor(1) as beside:
        run_here = beside.submit(here, "run", str(own))
        submitted = shell("submit", str(own), "--address", raylets.job_server)
        assert submitted.code == 0, submitted.err
        assert f"3 data files (0.0 MiB) found on {NUM_NODES} nodes" in submitted.err
        again = wait_for_end(shell, submitted.out.strip())
        done = run_here.result()
    assert [stage["state"] for stage in again["stages"]] == ["cached", "cached"]
    assert again["state"] == "completed"
    assert done.code == 0, done.out + done.err
    assert digests(here) == digests(shell)


def test_more_than_the_cluster_has_is_refused_at_once(raylets: Raylets, shell: Shell, quickstart: Path) -> None:
    done = shell("submit", str(quickstart), "--smoke", "--set", "cluster.workers=4", "--address", raylets.job_server)
    assert done.code == 3
    assert "needs 4 CPU (4 workers); the cluster has 3 CPU on 3 nodes" in done.err
    assert done.seconds < 5
    assert shell("status", "--json").json == []


def test_check_asks_the_cluster(raylets: Raylets, shell: Shell, quickstart: Path) -> None:
    checked = shell("check", str(quickstart), "--smoke", "--address", raylets.job_server, *WORKERS)
    assert checked.code == 0, checked.err
    refused = shell("check", str(quickstart), "--smoke", "--address", raylets.job_server, "--set", "cluster.workers=4")
    assert refused.code == 3
    assert max(checked.seconds, refused.seconds) < 30  # one small job of the cluster, which may be busy
