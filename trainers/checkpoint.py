"""Training state in the store: every rank writes the slices that it owns, rank 0 commits the manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.errors import StageError
from trainers import distributed
from trainers.engine.protocol import StatefulEngine, StateGroup
from trainers.loop import LoopState, SourceState
from trainers.store.manifest import Layout, StateManifest, TensorEntry, merge_entries
from trainers.store.state import TensorReader, write_tensors
from trainers.store.store import Store

SOURCE_GROUP = "source"


@dataclass(frozen=True)
class _SourceTensor:
    name: str
    values: Tensor
    group: str = SOURCE_GROUP
    start: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class StoreCheckpoint:
    """State of one stage of one run; the last `keep` states stay."""

    store: Store
    run: str
    stage: str
    fingerprint: str
    lease: int
    layout: Layout
    versions: Mapping[str, str]
    keep: int = 2

    def save(self, engine: StatefulEngine, loop: LoopState, source: SourceState) -> None:
        """Write this rank's slices; rank 0 commits when all have written."""
        place: dict[str, Any] = {"run": self.run, "stage": self.stage, "lease": self.lease, "step": loop.steps_done}
        written = write_tensors(self.store, engine.state_out(), **place)
        if distributed.rank() == 0 and source.tensors:
            pieces = [_SourceTensor(name, tensor.detach().cpu()) for name, tensor in source.tensors.items()]
            written = merge_entries([written, write_tensors(self.store, pieces, **place)])
        parts = distributed.gather_json(
            {group: [entry.model_dump(mode="json") for entry in entries] for group, entries in written.items()}
        )
        if distributed.rank() != 0:
            return
        manifest = StateManifest(
            run=self.run,
            stage=self.stage,
            fingerprint=self.fingerprint,
            step=loop.steps_done,
            lease=self.lease,
            tensors=merge_entries(_entries(part) for part in parts),
            values={"loop": asdict(loop), "source": source.values, "steps_applied": engine.steps_applied},
            versions=dict(self.versions),
            layout=self.layout,
        )
        self.store.commit_state(manifest, self.lease)
        self.store.keep_states(self.run, self.stage, self.keep)

    def restore(self, engine: StatefulEngine) -> tuple[LoopState, SourceState] | None:
        """Load the newest state that verifies, the same one on every rank."""
        manifest = find_state(self.store, self.run, self.stage, self.fingerprint)
        if manifest is None:
            return None
        with TensorReader(self.store, manifest) as reader:

            def read(group: StateGroup, name: str, start: int, stop: int) -> Tensor:
                return reader.read_range(group, name, start, stop)

            engine.state_in(read, steps_applied=int(_value(manifest, "steps_applied")))
            tensors = {name: reader.read(SOURCE_GROUP, name).clone() for name in reader.names(SOURCE_GROUP)}
        return LoopState(**_value(manifest, "loop")), SourceState(_value(manifest, "source"), tensors)


def find_state(store: Store, run: str, stage: str, fingerprint: str) -> StateManifest | None:
    """Return the newest state of a stage as rank 0 sees it; raises StageError when it belongs to another meaning."""
    found = store.latest_state(run, stage) if distributed.rank() == 0 else None
    raw = distributed.broadcast_json(None if found is None else found.model_dump(mode="json"))
    if raw is None:
        return None
    manifest = StateManifest.model_validate(raw)
    if manifest.fingerprint != fingerprint:
        raise StageError(
            f"the saved state of {stage} belongs to fingerprint {manifest.fingerprint[:12]}, not {fingerprint[:12]}"
        )
    return manifest


def versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")} | {
        "cuda": str(torch.version.cuda or "none")
    }


def _entries(part: Mapping[str, Any]) -> dict[str, list[TensorEntry]]:
    return {group: [TensorEntry.model_validate(entry) for entry in entries] for group, entries in part.items()}


def _value(manifest: StateManifest, key: str) -> Any:
    return manifest.values[key]
