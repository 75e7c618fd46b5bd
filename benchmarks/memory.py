"""Predicted memory of a worker against what its process takes, over a grid of recipes on the CPU.

    python -m benchmarks.memory [--only NAME]... [--json FILE]

Each recipe's last stage runs on one or two ranks for a few steps, from its data to its files. A line per part: what
`trainwright plan` predicts (`recipes/planning/memory.py`), what is measured (`memory_rank.py`), their ratio. `peak` is
the largest proportional size (PSS) of a rank in the whole stage; predicted is what the stage takes, and what a process
takes before it holds a model.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from benchmarks.memory_grid import RECIPES, write_data
from benchmarks.memory_rank import PARTS, Record, be_process, be_rank
from cluster.rank_process import rank_environment
from launch.capacity.workers import Workers
from launch.inputs.data_check import load_checked
from launch.inputs.resolve import resolve
from launch.inputs.resolved import Resolved
from launch.records.new_run import new_record
from recipes.planning.memory import Sizes
from recipes.planning.plan import PlannedStage
from recipes.planning.settle import Hardware
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

PRELOADED = ["trainers.runtime.preload", "launch.runs.stage_entry", "rlhf.task", "rlhf.text.preference_stage"]
PARTS_FLOOR = 1 << 20
"""Parts below this are not compared: a few scalars would be."""


@dataclass(frozen=True)
class Line:
    """One part of a recipe's stage, in bytes of its largest rank."""

    recipe: str
    part: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / max(1, self.measured)

    @property
    def text(self) -> str:
        """The line of the table."""
        sizes = f"{self.predicted / 2**20:9.1f} {self.measured / 2**20:8.1f}"
        return f"{self.recipe:24} {self.part:10} {sizes} {self.ratio:6.2f}"


def measure(name: str, folder: Path) -> tuple[Sizes, list[Record]]:
    """Run a recipe's stages that the folder's store does not have; the last one's sizes, and what each rank took.

    Raises RuntimeError with a rank's last words.
    """
    workers, stages = RECIPES[name]
    last = [*stages][-1]
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "seed": 0, "stages": stages}))  # which is YAML
    store = Store.open(str(folder / "store"))
    resolved = resolve(load_checked(path), store, Workers(workers, 0), Hardware())
    run = new_record(store, resolved).run
    made: dict[str, ArtifactManifest] = {}
    records: list[Record] = []
    for planned in resolved.plan(store).stages:
        if planned.cached and planned.name != last:
            found = store.find_artifact(planned.fingerprint)
            assert found is not None
            made[planned.name] = found
            continue
        job = job_of(resolved, planned, made, store, run)
        (result, *_), records = run_ranks(job, workers, folder)
        verified = {"verification": {"how": "not verified: memory alone is measured"}}
        manifest = ArtifactManifest.model_validate({**result["candidate"], **verified})
        made[planned.name] = store.put_artifact(manifest).manifest
        sizes = planned.sizes
    assert sizes is not None, f"{name}: {planned.unknown}"
    return sizes, records


def job_of(
    resolved: Resolved, planned: PlannedStage, made: dict[str, ArtifactManifest], store: Store, run: str
) -> dict[str, Any]:
    """What the driver hands to the ranks."""
    inputs = {path: made[reference.stage] for path, reference in resolved.internal[planned.name].items()}
    lease = store.take_lease(run, planned.name)
    return {
        "run": run,
        "stage": planned.name,
        "attempt": lease,
        "lease": lease,
        "store": store.uri,
        "recipe": resolved.recipe_json,
        "fingerprint": planned.fingerprint,
        "inputs": {path: manifest.model_dump(mode="json") for path, manifest in inputs.items()},
        "data": dict(resolved.data.get(planned.name, {})),
        "workers": planned.workers,
        "base_dir": str(resolved.base_dir),
        "uploaded": None,
    }


def run_ranks(job: dict[str, Any], workers: int, folder: Path) -> tuple[list[Any], list[Record]]:
    """Run a stage on separate ranks; what each returned, and what was measured of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(workers):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRAINWRIGHT_CACHE": folder / "cache",
        }  # fmt: skip
        environment = {key: str(value) for key, value in variables.items()}
        ranks.append(_forked(be_rank, job, environment, folder))
    for rank, process in enumerate(ranks):
        process.join()
        if process.exitcode:
            raise RuntimeError(f"rank {rank}: {(folder / f'rank{rank}.log').read_text()[-4000:]}")
    found = [pickle.loads((folder / f"rank{rank}.result").read_bytes()) for rank in range(workers)]
    return [result for result, _ in found], [record for _, record in found]


def process_bytes(folder: Path) -> int:
    """What a rank takes before it holds a model, by what `doctor --calibrate` does."""
    found = folder / "process"
    _forked(be_process, found).join()
    return int(found.read_text())


def _forked(target: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    return process


def lines_of(name: str, sizes: Sizes, records: Sequence[Record], process: int) -> Iterator[Line]:
    """Weights, gradients, optimiser and the peak; `process`: what a rank takes before it holds a model."""
    for part in PARTS:
        predicted, measured = getattr(sizes.memory, part), max(record["parts"].get(part, 0) for record in records)
        if max(predicted, measured) >= PARTS_FLOOR:
            yield Line(name, part, predicted, measured)
    peak = max(max(record["peaks"].values()) for record in records)
    yield Line(name, "peak", sizes.resident_bytes + process, peak)


def start_fork_server() -> None:
    """Import once what ranks need, as the fork server of a worker does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(rank_environment(os.environ, {}, 1, False))  # libraries read it when they are imported
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def main(arguments: Sequence[str]) -> None:
    """Print a line per recipe and part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(RECIPES), metavar="NAME", help="a recipe of the grid")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--folder", type=Path, help="keep data, models and logs there, and reuse its models")
    asked = parser.parse_args(arguments)
    start_fork_server()
    print(f"{'recipe':24} {'part':10} {'predicted':>8} {'measured':>8} {'ratio':>6}   (MiB)")
    report: dict[str, Any] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
        process = process_bytes(folder)
        print(f"a process without a model: {process / 2**20:.0f} MiB", flush=True)
        for name in asked.only or RECIPES:
            try:
                sizes, records = measure(name, folder)
            except RuntimeError as error:
                failed.append(f"{name}: {error}")
                print(f"{name:24} failed", flush=True)
                continue
            for line in lines_of(name, sizes, records, process):
                print(line.text, flush=True)
            report[name] = {"predicted": asdict(sizes), "measured": records, "process": process}
            if asked.json is not None:
                asked.json.write_text(json.dumps(report, indent=1))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
