"""Drives runs without training: stages that only write a file, in this process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.local_group import LocalGroup
from cluster.protocol import WorkerFailed
from launch.capacity.workers import Workers
from launch.cli import main as cli
from launch.inputs.resolve import resolve
from launch.inputs.resolved import Resolved
from launch.records.record import RunRecord
from launch.report.progress import SilentView
from launch.runs.execute_run import PoolRequest, RunOutcome, execute_run
from launch.runs.worker_pool import StageWorkers
from recipes.errors import VerificationError
from recipes.loading.load import load_recipe
from recipes.planning.settle import Hardware
from trainers.store.manifest import ArtifactManifest, Gate, Outcome, Parent, files_digest
from trainers.store.store import Store

RECIPE = """
name: toy
stages:
  base:
    kind: pretrain
    architecture:
      {family: decoder, type: llama, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64,
       num_attention_heads: 2}
    tokenizer: {train: bpe, vocab_size: 300}
    data: {source: text, files: [text.txt]}
    train: {steps: 4, global_batch: 4, sequence_length: 16, optimizer: {lr: 1e-3}}
  chat:
    kind: finetune
    init_from: base
    data: {source: text, files: [text.txt]}
    train: {steps: 4, global_batch: 4, sequence_length: 16, optimizer: {lr: 1e-3}}
  eval:
    kind: evaluate
    of: [base, chat]
    suites: [perplexity]
    text: {source: text, files: [text.txt]}
    sequence_length: 16
"""

KINDS = {
    "pretrain": "model",
    "finetune": "model",
    "reward": "reward_model",
    "rl": "actor_critic",
    "evaluate": "report",
    "feedback": "preferences",
}


class Stages:
    """Stage functions that remember what they were asked; a hook may fail, stop or fill in a failed gate."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.verified: list[str] = []
        self.refused: set[str] = set()
        """Stages whose files are not the live model."""
        self.hook: Callable[[dict[str, Any], Any], dict[str, Any] | None] = lambda job, worker: None

    def run_stage(self, job: dict[str, Any], worker: Any) -> dict[str, Any]:
        json.dumps(job)
        self.jobs.append(job)
        worker.beat("train", step=0, steps=2, loss=2.0)
        changes = self.hook(job, worker) or {}
        store = Store.open(job["store"])
        metrics = store.run(job["run"]).writer(f"metrics/{job['stage']}/{job['attempt']}")
        for step in (1, 2):
            metrics.append({"step": step, "values": {"loss": 2.0 / step}})
        metrics.flush()
        content = json.dumps([job["stage"], job["fingerprint"], sorted(job["inputs"])]).encode()
        files = {
            name: store.objects.put_chunks([data])
            for name, data in changes.get("files", {"model/weights.bin": content}).items()
        }
        manifest = ArtifactManifest(
            fingerprint=job["fingerprint"],
            digest=files_digest(files),
            kind=KINDS[job["recipe"]["stages"][job["stage"]]["kind"]],
            stage=job["stage"],
            files=files,
            parents={
                path: Parent(fingerprint=item["fingerprint"], digest=item["digest"])
                for path, item in job["inputs"].items()
            },
            data=job["data"],
            outcome=Outcome(steps_done=2, steps_planned=2),
            gate=Gate(**changes.get("gate", {})),
            metrics={"loss": 1.0},
        )
        return {
            "candidate": manifest.model_dump(mode="json"),
            "checks": changes.get("checks", [{}]),
            "outcome": {},
            "metrics": {},
        }

    def verify_candidate(self, job: dict[str, Any], worker: Any) -> dict[str, Any]:
        self.verified.append(job["stage"])
        assert job["candidate"]["stage"] == job["stage"]
        if job["stage"] in self.refused:
            raise VerificationError("model: the weights of the files are not the live model's")
        return {"how": "clean-process", "max_logit_difference": 0.0}


class FrankGroup(LocalGroup):
    """Passes a verdict that a hook raises on as it is."""

    def run(self, *arguments: Any, **settings: Any) -> list[Any]:
        try:
            return super().run(*arguments, **settings)
        except WorkerFailed as failure:
            raise failure.__cause__ if isinstance(failure.__cause__, WorkerFailed) else failure from None


class Bench:
    """Drives runs of the toy recipe with the fake stages."""

    def __init__(self, store: Store, recipe: Path, stages: Stages) -> None:
        self.store = store
        self.recipe = recipe
        self.stages = stages
        self.pools = 0

    def pool(self, request: PoolRequest) -> StageWorkers:
        self.pools += 1
        self.log_folder = request.log_folder
        return StageWorkers(FrankGroup, self.stages.run_stage, self.stages.verify_candidate, request.log_folder)

    def resolve(self, *overrides: str) -> Resolved:
        return resolve(load_recipe(self.recipe, overrides), self.store, Workers(1, 0), Hardware())

    def record(self, resolved: Resolved) -> RunRecord:
        from launch.records.new_run import new_record

        return new_record(self.store, resolved)

    def drive(self, *overrides: str, record: RunRecord | None = None) -> tuple[RunRecord, RunOutcome]:
        resolved = self.resolve(*overrides) if record is None else record.resolved()
        record = record or self.record(resolved)
        return record, execute_run(record, resolved, None, SilentView(), self.pool)


def trainwright(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["trainwright", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return ended.value.code or 0, shown.out, shown.err
