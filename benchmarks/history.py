"""What it costs to look at what was run: requests and seconds on S3, and the files that a long stage's metrics become.

    python benchmarks/history.py [--before FOLDER] [--runs 4] [--minutes 4] [--artifacts 20] [--delay-ms 30] [--hours 3]

S3 is moto in this process; every request is answered `delay-ms` later, and counted. Each side fills a bucket by its own
code: runs as their drivers leave them after some minutes, and artifacts of eight files. Then `status`, `store ls`,
`store verify` and `report last` run as commands. For the metrics a stage of some hours logs a step a second in a local
store, by a clock that is turned on; `report` reads them. `--before` is a work tree of another commit (`git worktree add
FOLDER COMMIT`) with the present folders, measured in the same run; without it there is one side.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve()
COMMANDS = (("status",), ("store", "ls"), ("store", "verify"), ("report", "last"))
RECIPE = "recipes/quickstart.yaml"
FILES = 8


class Server:
    """S3 that answers each request a while later, and counts."""

    def __init__(self, delay_s: float) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._alone, self._counting = threading.Lock(), threading.Lock()
        self.delay_s, self._under_way = delay_s, 0
        self.is_measured = False
        self.forget()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """Count from now on."""
        self.requests: Counter[str] = Counter()
        self.at_once = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        kind = "LIST" if "list-type" in environ.get("QUERY_STRING", "") else environ["REQUEST_METHOD"]
        with self._counting:
            self.requests[kind] += 1
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        try:
            if self.is_measured:
                time.sleep(self.delay_s)
            with self._alone:
                return list(self._app(environ, start_response))
        finally:
            with self._counting:
                self._under_way -= 1


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    wall_s: float
    cpu_s: float
    output: str


def run(tree: Path, arguments: list[str], **environment: str) -> Cost:
    """Run Python with a tree's code; its errors are ours."""
    began_at = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} in {tree} ended with {process.returncode}")
    return Cost(time.monotonic() - began_at, used.ru_utime + used.ru_stime, output)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    for name, value in {"runs": 4, "minutes": 4, "artifacts": 20, "delay-ms": 30, "hours": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        fill(options.fill, options)
        return
    sides = {"ours": HERE.parents[1]} if options.before is None else {"before": options.before.resolve()}
    sides["ours"] = HERE.parents[1]
    if options.runs:
        measure_requests(sides, options)
    if options.hours:
        measure_metrics(sides, options.hours)


def measure_requests(sides: dict[str, Path], options: argparse.Namespace) -> None:
    """Print what commands on S3 take."""
    server = Server(options.delay_ms / 1000)
    keys = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    keys |= {"AWS_DEFAULT_REGION": "us-east-1", "TRAINWRIGHT_CACHE": tempfile.mkdtemp()}
    os.environ |= keys
    import s3fs

    sizes = [f"--{name}={getattr(options, name)}" for name in ("runs", "minutes", "artifacts")]
    print(f"{options.runs} runs of {options.minutes} minutes, {options.artifacts} artifacts, {options.delay_ms} ms")
    for side, tree in sides.items():
        s3fs.S3FileSystem(endpoint_url=server.url).mkdir(side)
        server.is_measured = False
        run(tree, [str(HERE), f"--fill=s3://{side}/store", *sizes])
        server.is_measured = True
        for command in COMMANDS:
            server.forget()
            cost = run(tree, ["-m", "launch.cli", *command, "--store", f"s3://{side}/store"])
            counted = " + ".join(f"{count} {kind}" for kind, count in sorted(server.requests.items()))
            total = f"{server.requests.total():5} requests ({counted}), at most {server.at_once} at once"
            print(f"{side:8} {' '.join(command):14} {cost.wall_s:6.1f} s, {cost.cpu_s:5.1f} CPU s, {total}")


def fill(uri: str, options: argparse.Namespace) -> None:
    """Write what runs leave behind, with the code that is imported."""
    from launch.api import prepare
    from launch.records.new_run import new_record
    from trainers.store.manifest import ArtifactManifest, FileEntry, files_digest
    from trainers.store.store import Store

    store = Store.open(uri)
    for number in range(options.artifacts):
        data = {f"model/{part}": f"file {part} of artifact {number}".encode() for part in range(FILES)}
        files = {name: FileEntry(sha256=store.objects.put_bytes(text), bytes=len(text)) for name, text in data.items()}
        manifest = {"fingerprint": f"{number:064x}", "digest": files_digest(files), "kind": "model", "stage": "base"}
        store.put_artifact(ArtifactManifest.model_validate({**manifest, "files": files}))
    # What later commits ask, whether models of the hub are fetched, is nothing to this recipe.
    keys = {"fetches": False} if "fetches" in signature(prepare).parameters else {}
    resolved = prepare(RECIPE, (), True, store, None, **keys)
    for _ in range(options.runs):
        leave_run(store, new_record(store, resolved), 60 * options.minutes, options.stages)


def leave_run(store: Any, record: Any, seconds: int, num_stages: int | None) -> None:
    """Write a run's journal and metrics as its driver and its first rank do; its (first) stages share the time."""
    from launch.records.journal import this_driver

    journal = record.journal()
    journal.write("run_started", driver=this_driver(), next_s=3)
    names = [entry["name"] for entry in record.raw["plan"]][:num_stages]
    for name in names:
        journal.write("stage_started", stage=name, attempt=1, fingerprint="0" * 64)
        log_metrics(store, record.run, name, seconds // len(names))
        journal.write("stage_failed", stage=name, attempt=1, verdict={"message": "made up"}, retry=False)
    elapsed = 0.0
    while elapsed < seconds:
        elapsed += max(3.0, 0.02 * elapsed)
        journal.write("progress", stage=names[-1], phase="train", step=int(elapsed), steps=seconds)
    journal.write("run_finished", state="failed", exit_code=1)
    if hasattr(record, "write_end"):
        record.write_end(journal)


def log_metrics(store: Any, run_id: str, stage: str, seconds: int) -> None:
    """Log a step a second as a stage does, by a clock that is turned on."""
    from launch.runs import stage_entry as stages
    from launch.runs.stage_entry import Progress, StageObserver

    with turned_clock(stages) as clock:
        worker: Any = SimpleNamespace(rank=0, beat=lambda *_, **__: None, stop_requested=lambda: False)
        job = {"run": run_id, "stage": stage, "attempt": 1}
        observer = StageObserver(worker, store, job, Progress("step", 1, "tokens", ("loss",)))
        values = {"loss": 2.5, "grad_norm": 1.25, "lr": 1e-3, "weight": 4096.0, "step_s": 1.0, "samples": 128.0}
        for step in range(seconds):
            clock.now = float(step)
            observer.metrics(step, {**values, "loss": 2.5 + 1.0 / (step + 1)})
        observer.flush()


@contextmanager
def turned_clock(module: Any) -> Iterator[SimpleNamespace]:
    """Let a module see a clock of ours."""
    clock = SimpleNamespace(now=0.0)
    known = module.time
    module.time = SimpleNamespace(monotonic=lambda: clock.now)
    try:
        yield clock
    finally:
        module.time = known


def measure_metrics(sides: dict[str, Path], hours: int) -> None:
    """Print what the metrics of a long stage take on a disk, and their report."""
    print(f"metrics of a stage of {hours} hours, a step a second")
    for side, tree in sides.items():
        with tempfile.TemporaryDirectory(prefix="trainwright-history-") as folder:
            store = f"{folder}/store"
            one = ["--runs=1", "--stages=1", "--artifacts=1"]
            run(tree, [str(HERE), f"--fill={store}", f"--minutes={60 * hours}", *one])
            files = list(Path(store).glob("runs/*/metrics/**/*.jsonl"))
            disk = sum(path.stat().st_blocks * 512 for path in files) / 2**20
            data = sum(path.stat().st_size for path in files) / 2**20
            cost = run(
                tree, ["-m", "launch.cli", "report", "last", "--store", store, "--output", f"{folder}/page.html"]
            )
            taken = f"{len(files):6} files, {disk:6.1f} MiB on disk, {data:5.1f} MiB of data"
            print(f"{side:8} {taken}; report {cost.cpu_s:5.1f} CPU s, {cost.wall_s:5.1f} s")


if __name__ == "__main__":
    main()
