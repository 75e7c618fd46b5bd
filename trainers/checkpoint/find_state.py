"""Finding the training state to go on from: the ranks hash it together, each a share, before anything of it is used."""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.errors import StageError, StoreDamaged
from trainers.runtime import distributed
from trainers.store.manifest import FileEntry, StateManifest
from trainers.store.store import Store


def find_state(
    store: Store,
    run: str,
    stage: str,
    fingerprint: str,
    accepts: Sequence[str] = (),
    replaced: Sequence[str] = (),
) -> StateManifest | None:
    """Return the newest whole state of a stage, the same one on every rank; None also for a `replaced` fingerprint.

    Every object was hashed by one of the ranks; what a rank of another machine has hashed is hashed again when it is
    opened. Collective. Raises StageError when the state belongs to a meaning that is neither this nor one that is
    accepted, StoreDamaged when there are states and none is whole.
    """
    manifest = _newest_whole(store, run, stage)
    if manifest is None or manifest.fingerprint in replaced:
        return None
    if manifest.fingerprint != fingerprint and manifest.fingerprint not in accepts:
        raise StageError(
            f"the saved state of {stage} belongs to fingerprint {manifest.fingerprint[:12]}, not {fingerprint[:12]}"
        )
    return manifest


def check_state(store: Store, manifest: StateManifest) -> None:
    """Hash a state's objects, each rank a share; raises on every rank what any of them met. Collective."""
    _raise_told(_verify_together(store, manifest))


def _newest_whole(store: Store, run: str, stage: str) -> StateManifest | None:
    """Rank 0 looks and proposes; all ranks check what it proposes, until it says which one it is."""
    if distributed.rank() != 0:
        while "candidate" in (told := distributed.broadcast_json(None)):
            _verify_together(store, StateManifest.model_validate(told["candidate"]))
        _raise_told(told["problem"])
        return None if told["found"] is None else StateManifest.model_validate(told["found"])

    def check(manifest: StateManifest) -> None:
        distributed.broadcast_json({"candidate": manifest.model_dump(mode="json")})
        _raise_told(_verify_together(store, manifest))

    try:
        found = store.latest_state(run, stage, check=check)
    except Exception as error:  # told to the other ranks, which wait for a word, then raised
        distributed.broadcast_json({"found": None, "problem": _told(error)})
        raise
    distributed.broadcast_json({"found": None if found is None else found.model_dump(mode="json"), "problem": None})
    return found


def _verify_together(store: Store, manifest: StateManifest) -> dict[str, Any] | None:
    """Hash this rank's share of a state's objects; returns the first problem that any rank met. Collective."""
    problem, marks = None, {}
    node = _node()
    nodes = distributed.gather_json(node)
    threads = max(1, len(os.sched_getaffinity(0)) // nodes.count(node))
    try:
        marks = store.objects.verify_all(_share(list(manifest.objects()), nodes), threads)
    except Exception as error:  # told to all ranks, which raise it together
        problem = _told(error)
    parts: list[dict[str, Any]] = distributed.gather_json({"problem": problem, "marks": marks})
    for part, where in zip(parts, nodes, strict=True):
        if where == node:
            store.objects.trust({sha256: tuple(mark) for sha256, mark in part["marks"].items()})
    problems = [part["problem"] for part in parts if part["problem"] is not None]
    # Damage is answered by an older state; what is none comes first and ends the search.
    return min(problems, key=lambda one: bool(one["is_damage"]), default=None)


def _told(error: Exception) -> dict[str, Any]:
    is_damage = isinstance(error, StoreDamaged)
    where = "" if is_damage else f"rank {distributed.rank()}: {type(error).__name__}: "
    return {"text": f"{where}{error}", "is_damage": is_damage}


def _raise_told(problem: Mapping[str, Any] | None) -> None:
    if problem is not None:
        raise (StoreDamaged if problem["is_damage"] else StageError)(problem["text"])


def _share(entries: Sequence[FileEntry], nodes: Sequence[str]) -> list[str]:
    """Return the hashes of this rank's share: the largest objects first, each to the rank with the least so far."""
    loads = [0] * len(nodes)
    mine = []
    for entry in sorted(entries, key=lambda entry: (-entry.bytes, entry.sha256)):
        rank = loads.index(min(loads))
        loads[rank] += entry.bytes
        if rank == distributed.rank():
            mine.append(entry.sha256)
    return mine


def _node() -> str:
    """Return what tells this machine, since it was started, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
