"""A short life of a store with one of everything: commits, retention, pins, damage, collection. Run by the nursery."""

import os
import time
from collections.abc import Callable

from trainers.store.collection import Keep, collect
from trainers.store.manifest import ArtifactManifest, FileEntry, Layout, Slice, StateManifest, TensorEntry, files_digest
from trainers.store.manifest import sha256_hex as sha
from trainers.store.place import CHUNK_BYTES
from trainers.store.store import Store

Acknowledge = Callable[..., None]
BESIDE = CHUNK_BYTES + 300
"""Bytes of a state that is hashed in a thread beside the writing."""


def state_object(store: Store, owner: str, content: bytes) -> FileEntry:
    """Write a safetensors object as training states have them."""
    end = len(content)
    header = f'{{"__metadata__":{{"owner":"{owner}"}},"w":{{"dtype":"U8","shape":[{end}],"data_offsets":[0,{end}]}}}}'
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return store.objects.put_chunks([len(text).to_bytes(8, "little"), text, content])


def artifact(store: Store, fingerprint: str, num_files: int = 3) -> ArtifactManifest:
    """Commit an artifact whose content follows from its fingerprint."""
    contents = {f"model/{index}": f"{fingerprint}{index}".encode() * 50 for index in range(num_files)}
    files = {name: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data)) for name, data in contents.items()}
    return store.put_artifact(
        ArtifactManifest(fingerprint=fingerprint, digest=files_digest(files), kind="model", stage="base", files=files)
    ).manifest


def state(store: Store, run: str, stage: str, lease: int, step: int, content: bytes) -> StateManifest:
    """Commit a training state with one tensor."""
    written = state_object(store, f"{run}/{stage}/{lease}/{step}", content)
    piece = Slice(start=[0], shape=[len(content)], object=written, key="w")
    manifest = StateManifest(
        run=run, stage=stage, fingerprint=sha(run.encode()), step=step, lease=lease,
        tensors={"param": [TensorEntry(name="w", shape=[len(content)], dtype="U8", slices=[piece])]},
        layout=Layout(workers=1, micro_batch=1, accumulation=1),
    )  # fmt: skip
    store.commit_state(manifest, lease)
    return manifest


def live(store: Store, acknowledge: Acknowledge) -> None:
    """Do one of everything, and say after each call what was promised by it."""
    lease = store.take_lease("run", "base")
    acknowledge("lease", lease)
    kept, dropped = sha(b"kept"), sha(b"dropped")
    artifact(store, kept, 2)
    acknowledge("artifact", kept)
    artifact(store, dropped, 1)
    store.pin(kept, "for ever")
    acknowledge("pin", kept)
    for step in (1, 2, 3):
        state(store, "run", "base", lease, step, os.urandom(300 if step != 2 else BESIDE))
        acknowledge("state", step)
        store.keep_states("run", "base", keep=2)
    segments = store.run("run").writer("journal")
    segments.append({"n": 1})
    segments.flush()
    acknowledge("line", 1)
    store.objects.put_bytes(b"never committed")
    for _ in range(3):
        collect(store, grace_s=0, keep=Keep(set(), {"run"}))
        acknowledge("collected", int(time.time()))
    acknowledge("unpinning", kept)
    store.unpin(kept)
    acknowledge("unpinned", kept)
    acknowledge("done", int(time.time()))
