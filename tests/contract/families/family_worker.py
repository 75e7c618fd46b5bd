"""One rank of the families' conformance kit: runs small stages of every family as whole stages.

Usage: python family_worker.py FOLDER JOB; JOB is a JSON list of cases {"family", "run", "stop_at", "shard"}. Rank 0
writes FOLDER/<run>-<family>.json for each case that reaches its end, FOLDER/<run>-<family>.error where it raises.
"""

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.errors import Preempted
from recipes.load import parse_recipe
from recipes.stages import Pretrain
from trainers import distributed
from trainers.stage import StageContext, verify_checks
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store

STEPS = 6
TRAIN: dict[str, Any] = {
    "steps": STEPS,
    "global_batch": 8,
    "optimizer": {"lr": 1e-2},
    "save_every": 100,
    "evaluate_every": 4,
    "evaluation_rows": 16,
}
DIGITS: dict[str, Any] = {"source": "digits", "hold_out": 0.2, "limit": 96}


def picture_stage(**architecture: Any) -> dict[str, Any]:
    """Give a small stage on the digits."""
    return {"kind": "pretrain", "architecture": architecture, "data": DIGITS, "train": {**TRAIN, "grid": 4}}


def text_stage(length: int = 32, **architecture: Any) -> dict[str, Any]:
    """Give a small stage on the folder's text."""
    return {
        "kind": "pretrain",
        "architecture": architecture,
        "tokenizer": {"train": "bpe", "vocab_size": 320, "cls_token": "<|cls|>", "mask_token": "<|mask|>"},
        "data": {"source": "text", "files": ["text.txt"], "documents": "paragraph", "hold_out": 0.2},
        "train": {**TRAIN, "sequence_length": length},
    }


STAGES: dict[str, dict[str, Any]] = {
    "decoder": text_stage(
        family="decoder",
        type="llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "rnn": text_stage(
        16, family="rnn", type="lstm", hidden_size=32, embedding_size=24, num_hidden_layers=2, dropout=0.0
    ),
    "encoder": text_stage(
        family="encoder",
        type="bert",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    "classifier": picture_stage(family="classifier", type="convnet", width=8, features=8),
    "vae": picture_stage(family="vae", type="convnet", width=8, depth=2, latent=4, binarize=True, kl_warmup_steps=4),
    "gan": picture_stage(
        family="gan", width=4, latent=4, spectral_norm=True, r1_gamma=0.5, ema_decay=0.9, class_conditional=True
    ),
    "ddpm": picture_stage(
        family="ddpm",
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        attention_levels=[1],
        timesteps=50,
        sampling_steps=5,
        class_conditional=True,
        guidance=2.0,
        min_snr_gamma=5.0,
        ema_decay=0.9,
    ),
}
"""A small stage of every family by its name."""


class Observer:
    """Asks to stop at a step and remembers the losses."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.step = 0
        self.losses: dict[int, float] = {}
        self.generator_losses: dict[int, float] = {}
        self.held_out: dict[int, float] = {}

    def phase(self, name: str, **progress: float) -> None:
        self.step = int(progress.get("step", 0))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.losses[step] = values["loss"]
        if "generator_loss" in values:
            self.generator_losses[step] = values["generator_loss"]
        if "eval/loss" in values:
            self.held_out[step] = values["eval/loss"]

    def stop_requested(self) -> bool:
        return 0 < self.stop_at <= self.step and distributed.rank() == distributed.world_size() - 1


def run_case(folder: Path, ranks: distributed.Ranks, case: dict[str, Any]) -> None:
    """Run one stage to its end or to a preemption."""
    family, run, stop_at = case["family"], case["run"], case.get("stop_at", 0)
    stage = STAGES[family] | case.get("stage", {}) | {"shard": case["shard"]}
    spec = parse_recipe({"name": "kit", "stages": {family: stage}}).stages[family]
    uri = str(folder / "store")
    store = Store.open(uri)
    lease = int(distributed.broadcast_json(store.take_lease(run, family) if ranks.rank == 0 else None))
    observer = Observer(stop_at)
    fingerprint = f"{sorted(STAGES).index(family):064x}"
    context = StageContext(store, run, family, fingerprint, lease, 0, folder, {}, {}, observer, ranks)
    try:
        if isinstance(spec, Pretrain):
            from trainers.language_stage import run_language_model

            draft = run_language_model(spec, context)
        else:
            from trainers.image_stage import run_image

            draft = run_image(spec, context)  # type: ignore[arg-type]
    except Preempted:
        assert stop_at
        return
    assert not stop_at
    if draft is None:
        return
    manifest = ArtifactManifest(
        fingerprint=fingerprint,
        digest=files_digest(draft.files),
        kind=draft.kind,  # type: ignore[arg-type]
        stage=family,
        files=dict(draft.files),
        outcome=dict(draft.outcome),  # type: ignore[arg-type]
    )
    if run == "straight":
        store.put_artifact(manifest)
        store.name_artifact(family, fingerprint)
    result = {
        **draft.to_json(),
        "difference": verify_checks(store, draft.files, list(draft.checks), {}, uri),
        "digest": manifest.digest,
        "losses": observer.losses,
        "generator_losses": observer.generator_losses,
        "held_out": observer.held_out,
        "grids": [line for line in store.run(run).read_lines(f"samples/{family}") if "image" in line],
    }
    (folder / f"{run}-{family}.json").write_text(json.dumps(result))


def main() -> None:
    """Run the cases; a failed one is reported and ends this rank."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    ranks = distributed.join()
    for case in cases:
        try:
            run_case(folder, ranks, case)
        except Exception:
            (folder / f"{case['run']}-{case['family']}.error").write_text(traceback.format_exc())
            raise
        distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    main()
