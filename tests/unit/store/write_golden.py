"""Writes the golden store of the present format: python tests/unit/store/write_golden.py FOLDER.

The committed one (golden/format-1) is never written again: it stands for the stores that users have.
"""

import sys
from dataclasses import dataclass

import torch

from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    FileEntry,
    Gate,
    Layout,
    Outcome,
    Parent,
    StateManifest,
    Verification,
    canonical_json,
    files_digest,
    merge_entries,
    sha256_hex,
)
from trainers.store.state import write_tensors
from trainers.store.store import Store

RUN = "helper-20260102-030405-0a1b"
BASE, CHAT, DATA = (sha256_hex(name) for name in (b"base", b"chat", b"data"))
MATRIX = torch.arange(6, dtype=torch.float32).reshape(2, 3)
MOMENT = torch.tensor([0.5, -0.25], dtype=torch.bfloat16)


@dataclass(frozen=True)
class Piece:
    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor


def put(store: Store, contents: dict[str, bytes]) -> dict[str, FileEntry]:
    return {name: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data)) for name, data in contents.items()}


def main(folder: str) -> None:
    """Write one of everything."""
    store = Store.open(folder)
    files = put(
        store, {"model/config.json": b'{"model_type":"llama"}', "model/model.safetensors": b"\x02" + bytes(7) + b"{}"}
    )
    base = ArtifactManifest(
        fingerprint=BASE, digest=files_digest(files), kind="model", stage="base", files=files,
        data={"data": DATA}, contract=sha256_hex(b"contract"), architecture={"type": "llama", "hidden_size": 128},
        versions={"torch": "2.13.0"}, metrics={"loss": 2.5, "tokens": 1000},
        outcome=Outcome(state="completed", steps_done=10, steps_planned=10),
        verification=Verification(how="clean process", max_logit_difference=0.0), exactness="bit-exact",
    )  # fmt: skip
    store.put_artifact(base)
    files = put(store, {"adapter/adapter_config.json": b'{"r":8}', "model/config.json": b'{"model_type":"llama"}'})
    chat = ArtifactManifest(
        fingerprint=CHAT, digest=files_digest(files), kind="model", stage="chat", files=files, base=base.digest,
        parents={"init_from": Parent(fingerprint=BASE, digest=base.digest, part="model")},
        gate=Gate(passed=False, reasons=["eos_rate 0.1 is below 0.5"]),
        outcome=Outcome(state="stopped_by", rule="kl", steps_done=3, steps_planned=8), changes=["train.steps"],
        source="hf://org/name@abc",
    )  # fmt: skip
    store.put_artifact(chat)
    store.name_artifact("best", BASE)
    store.name_artifact("best", CHAT)
    store.put_dataset(DatasetManifest(digest=DATA, files=put(store, {"tokens.npy": b"tokens"}), report={"rows_in": 7}))
    for step in (1, 2):
        lease = store.take_lease(RUN, "base")
        pieces = [
            [Piece("param", "w", (2, 3), 0, MATRIX.flatten()[:4]), Piece("exp_avg", "w", (2, 3), 0, torch.zeros(6))],
            [Piece("param", "w", (2, 3), 4, MATRIX.flatten()[4:]), Piece("exp_avg_sq", "b", (2,), 0, MOMENT)],
        ]
        parts = [write_tensors(store, rank, run=RUN, stage="base", lease=lease, step=step) for rank in pieces]
        state = StateManifest(
            run=RUN, stage="base", fingerprint=BASE, step=step, lease=lease, tensors=merge_entries(parts),
            values={"samples": 64 * step, "kl_coef": 0.05}, versions={"torch": "2.13.0"},
            layout=Layout(workers=2, micro_batch=4, accumulation=8),
        )  # fmt: skip
        store.commit_state(state, lease)
    run = store.run(RUN)
    created = {
        "format": 1,
        "run": RUN,
        "recipe": "helper",
        "created_at": "2026-01-02T03:04:05.04+00:00",
        "nonce": "00" * 8,
    }
    run.write_once("run.json", canonical_json(created))
    run.write_once("recipe.json", b'{"name":"helper"}')
    writer = run.writer("metrics/base/1")
    for step in range(3):
        writer.append({"step": step, "loss": 3.0 - step})
        writer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
