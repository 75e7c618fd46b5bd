"""Our side of `rl.py`: a recipe's stage run in this process, as a worker runs it.

    python benchmarks/rl_ours.py TASK.json FOUND.json

What `trainwright run` does, less Ray: the recipe is resolved for this machine and its stage runs through the same
executor, in a group of one rank. Iterations are told apart by the beats that a rank sends its driver.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from cluster.local_group import LocalGroup
from cluster.protocol import Json, OnBeat, Target, WorkerSpec
from cluster.session import local_nodes
from launch.capacity.workers import Workers, hardware_of
from launch.inputs.resolve import resolve
from launch.records.new_run import new_record
from launch.records.record import RunRecord
from launch.report.progress import SilentView
from launch.runs.execute_run import RUN_STAGE, VERIFY_CANDIDATE, PoolRequest, execute_run
from launch.runs.worker_pool import StageWorkers
from recipes.loading.load import load_recipe
from trainers.store.store import Store

LENGTH = {"rule": "length", "min": 10, "max": 30, "slack": 20}


@dataclass(frozen=True)
class Mark:
    """When a phase began."""

    phase: str
    cpu: float
    wall: float


class Timed(LocalGroup):
    """Notes when the rank's phases begin."""

    def __init__(self, spec: WorkerSpec, marks: list[Mark]) -> None:
        super().__init__(spec)
        self._marks = marks

    def run(
        self, target: Target, payload: Json, on_beat: OnBeat | None = None, *, label: str = "run"
    ) -> list[Json | None]:
        """Calls the target here."""

        def heard(rank: int, phase: str, progress: Json) -> None:
            if not self._marks or self._marks[-1].phase != phase:
                self._marks.append(Mark(phase, time.process_time(), time.perf_counter()))
            if on_beat is not None:
                on_beat(rank, phase, progress)

        return super().run(target, payload, heard, label=label)


def main() -> None:
    """Run the stage, and write what it took."""
    asked, answer = map(Path, sys.argv[1:])
    task = json.loads(asked.read_text())
    marks: list[Mark] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(yaml.safe_dump({"name": "speed", "stages": {"policy": stage_of(task)}}))
        store, workers = Store.open(str(Path(folder) / "store")), Workers(1, 0)
        record = new_record(store, resolve(load_recipe(path), store, workers, hardware_of(local_nodes(), workers)))

        def pool(request: PoolRequest) -> StageWorkers:
            return StageWorkers(lambda spec: Timed(spec, marks), RUN_STAGE, VERIFY_CANDIDATE, request.log_folder)

        execute_run(record, record.resolved(), None, SilentView(), pool)
        answer.write_text(json.dumps(found_in(marks, record)))


def stage_of(task: dict[str, Any]) -> dict[str, Any]:
    """The stage; what the task does not name is left to the defaults."""
    algorithm: dict[str, Any] = {
        "name": task["algorithm"],
        "iterations": task["iterations"],
        "epochs": task["epochs"],
        "mini_batches": 1,
        "kl_coef": task["kl_coef"],
        "optimizer": {"lr": 1e-6},
        "save_every": task["iterations"],
    }
    is_judged = task["algorithm"] == "ppo"
    stage: dict[str, Any] = {
        "kind": "rl",
        "actor": task["model"],
        "prompts": {"source": "jsonl", "files": [task["prompts"]]},
        "template": "none",
        "rewards": {"score": {"model": task["reward"]} if is_judged else LENGTH},
        "probe": "off",
        "gate": "ignore",
        "rollout": {
            "prompts_per_iteration": task["samples"] // task["group"],
            "samples_per_prompt": task["group"],
            "max_prompt_tokens": task["prompt_tokens"],
            "max_new_tokens": task["new_tokens"],
        },
        "algorithm": algorithm,
    }
    if task["setting"] != "default":
        stage["shard"] = {"precision": task["setting"], "micro_batch": task["micro_batch"]}
    return stage


def found_in(marks: list[Mark], record: RunRecord) -> dict[str, Any]:
    """Iterations reach from the start of their rollouts to the start of the next ones; the first one is left out."""
    starts = [place for place, mark in enumerate(marks) if mark.phase == "rollout"]
    pairs = list(pairwise(starts[1:]))
    parts: dict[str, float] = defaultdict(float)
    for place in range(starts[1], starts[-1]):
        parts[marks[place].phase] += (marks[place + 1].cpu - marks[place].cpu) / len(pairs)
    lengths = [line["values"]["length_mean"] for line in record.metrics("policy") if "length_mean" in line["values"]]
    shard = record.resolved().recipe.stages["policy"].shard
    return {
        "cpu": [marks[end].cpu - marks[start].cpu for start, end in pairs],
        "wall": [marks[end].wall - marks[start].wall for start, end in pairs],
        "response_tokens": sum(lengths) / len(lengths),
        "parts": dict(parts),
        "says": f"{shard.precision} {shard.engine_text}, {shard.micro_batch}",
    }


if __name__ == "__main__":
    main()
