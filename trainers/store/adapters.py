"""What a model of an artifact is opened from: its own files, or a whole model with adapters on it that nobody merged.

Merged files in bf16 hold what is left of an adapter's update after rounding to the base's own precision. Where the
adapter and what it was trained on are in the store, they are opened instead, and nothing is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.errors import RequestError
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

ADAPTER = "adapter"
"""Part of an artifact that holds its adapter."""
WHOLE_PARTS = ("model", "actor")
"""Parts of an artifact that hold its whole model."""


@dataclass(frozen=True)
class Weights:
    """A whole model's folder and the adapters to put on it, the lowest first."""

    folder: Path
    stack: tuple[str, ...]
    """Digests of the artifacts that the folder and each of the adapters are of; the last is the model's own."""
    adapters: tuple[Path, ...] = ()
    dtype: str = "float32"
    """Precision in which the folder's weights were while the adapters on them were trained."""
    quantized: Literal["nf4", "int8"] | None = None
    """Into which bits the folder's linear modules are rounded under the adapters; None: they are as they are."""
    note: str | None = None
    """What was lost, where the adapters could not be had."""
    continued: Path | None = None
    """An adapter that goes on learning on the others, instead of a new one over it."""


def weights_of(store: Store, manifest: ArtifactManifest) -> Weights:
    """Return what an artifact's model is opened from.

    Its whole model, unless that holds a merged adapter in less than fp32 and everything below the adapter is in the
    store. Raises RequestError for an artifact without a whole model.
    """
    if not manifest.lies_on or _dtype(manifest) == "float32":
        return Weights(store.folder(manifest, whole_part(manifest)), (manifest.digest,))
    found = find_stack(store, manifest, (*manifest.lies_on, manifest.digest))
    if found is None:
        missing = f"the base of its adapter, digest {manifest.lies_on[0][:16]}, is not in store {store.uri}"
        return whole_weights(store, manifest, missing)
    return found


def whole_weights(store: Store, manifest: ArtifactManifest, reason: str) -> Weights:
    """Return an artifact's merged model, with a note of what that costs and why it is taken."""
    lost = None if manifest.verification is None else manifest.verification.merge_lost
    share = "part" if lost is None else f"{lost:.0%}"
    note = f"{manifest.stage} is opened merged, and rounding took {share} of its adapter's update: {reason}"
    return Weights(store.folder(manifest, whole_part(manifest)), (manifest.digest,), note=note)


def find_stack(store: Store, manifest: ArtifactManifest, digests: Sequence[str]) -> Weights | None:
    """Return the whole model of the first of some artifacts and the adapters of the others; None where one is missing.

    `manifest` is one of them, or was made from them.
    """
    found = {manifest.digest: manifest}
    waiting = [manifest]
    while waiting and not found.keys() >= set(digests):
        for parent in waiting.pop(0).parents.values():
            artifact = None if parent.digest in found else store.find_artifact(parent.fingerprint)
            if artifact is not None and artifact.digest == parent.digest:
                found[artifact.digest] = artifact
                waiting.append(artifact)
    if not found.keys() >= set(digests):
        found |= {artifact.digest: artifact for artifact in store.list_artifacts()}
    if not found.keys() >= set(digests):
        return None
    first, *others = (found[digest] for digest in digests)
    adapters = tuple(store.folder(artifact, ADAPTER) for artifact in others)
    dtype, quantized = (_dtype(others[0]), others[-1].quantized) if others else ("float32", None)
    return Weights(store.folder(first, whole_part(first)), tuple(digests), adapters, dtype, quantized)


def _dtype(manifest: ArtifactManifest) -> str:
    """Return the precision that a stage trained in and wrote its model in."""
    return str((manifest.architecture or {}).get("dtype", "float32"))


def whole_part(manifest: ArtifactManifest) -> str:
    """Return the part of an artifact that holds its whole model; raises RequestError for an unmerged adapter."""
    for part in WHOLE_PARTS:
        if any(name.startswith(f"{part}/") for name in manifest.files):
            return part
    raise RequestError(f"{manifest.stage} holds no merged model; set merge: true there")
