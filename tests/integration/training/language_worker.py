"""One rank of the language stage tests: runs stages of a small recipe on text and JSONL files.

Usage: python language_worker.py FOLDER; writes FOLDER/<run>-<stage>.json on rank 0 for each finished stage.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.errors import Preempted
from recipes.load import parse_recipe
from trainers import distributed
from trainers.language_stage import run_language_model
from trainers.stage import StageContext, verify_checks
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store

TRAIN: dict[str, Any] = {
    "steps": 6,
    "global_batch": 8,
    "sequence_length": 32,
    "optimizer": {"lr": 1e-2},
    "save_every": 100,
    "evaluate_every": 4,
    "evaluation_rows": 8,
}
RECIPE: dict[str, Any] = {
    "name": "small",
    "stages": {
        "base": {
            "kind": "pretrain",
            "architecture": {
                "family": "decoder",
                "type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 320},
            "data": {"source": "text", "files": ["text.txt"], "documents": "paragraph", "hold_out": 0.2},
            "train": TRAIN,
            "shard": {"zero": 2},
        },
        "chat": {
            "kind": "finetune",
            "init_from": "base",
            "lora": {"r": 4},
            "data": {"source": "jsonl", "files": ["chat.jsonl"], "hold_out": 0.2},
            "train": TRAIN,
            "shard": {"zero": 3, "precision": "bf16"},
        },
    },
}


class Observer:
    """Asks to stop at a step and remembers what it heard."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.step = 0
        self.steps: list[int] = []
        self.phases: list[str] = []

    def phase(self, name: str, **progress: float) -> None:
        self.phases.append(name)
        self.step = int(progress.get("step", 0))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "lr" in values:
            self.steps.append(step)

    def stop_requested(self) -> bool:
        return self.stop_at > 0 and self.step >= self.stop_at and distributed.rank() == 1


def run_stage(folder: Path, ranks: distributed.Ranks, run: str, stage: str, stop_at: int = 0) -> None:
    """Run one stage to its end or to a preemption."""
    uri = str(folder / "store")
    store = Store.open(uri)
    lease = int(distributed.broadcast_json(store.take_lease(run, stage) if ranks.rank == 0 else None))
    inputs: dict[str, ArtifactManifest] = {}
    if stage == "chat":
        inputs["init_from"] = store.resolve("base")
    observer = Observer(stop_at)
    fingerprint = {"base": "a", "chat": "b"}[stage] * 64
    context = StageContext(store, run, stage, fingerprint, lease, 0, folder, inputs, {}, observer, ranks)
    spec = parse_recipe(RECIPE).stages[stage]
    try:
        draft = run_language_model(spec, context)  # type: ignore[arg-type]
    except Preempted:
        assert stop_at
        return
    assert not stop_at
    if draft is not None:
        difference = verify_checks(store, draft.files, list(draft.checks), inputs, uri)
        manifest = ArtifactManifest(
            fingerprint=fingerprint,
            digest=files_digest(draft.files),
            kind=draft.kind,  # type: ignore[arg-type]
            stage=stage,
            files=dict(draft.files),
            base=draft.base,
            outcome=dict(draft.outcome),  # type: ignore[arg-type]
        )
        store.put_artifact(manifest)
        if run == "straight":
            store.name_artifact(stage, fingerprint)
        result = {**draft.to_json(), "difference": difference, "digest": manifest.digest, "steps": observer.steps}
        (folder / f"{run}-{stage}.json").write_text(json.dumps(result))
    distributed.barrier()


def main() -> None:
    """Run both stages straight, then each with a stop on the way."""
    folder = Path(sys.argv[1])
    ranks = distributed.join()
    for stage in ("base", "chat"):
        run_stage(folder, ranks, "straight", stage)
        run_stage(folder, ranks, "stopped", stage, stop_at=2)
        run_stage(folder, ranks, "stopped", stage)
    distributed.leave()


if __name__ == "__main__":
    main()
