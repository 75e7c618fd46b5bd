"""What a commit may name: a ref only its own folder's manifest, a training state only the objects written for it.

What a state's manifest says of its objects is compared with their headers.

The header of each object of a training state carries its owner's mark, `run/stage/lease/step`. So a state shares no
object with another commit, and retention deletes a dropped state's objects without asking who else names them.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from recipes.errors import StoreDamaged
from recipes.models.safetensors_headers import parse_header
from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    FileEntry,
    Manifest,
    RolloutsManifest,
    Slice,
    StateManifest,
    StoreFormat,
    objects_of,
    read_manifest,
)
from trainers.store.objects import ObjectStore, object_path

_MARK = re.compile(r"[^/]+/[^/]+/\d+/\d+")


def owner_mark(run: str, stage: str, lease: int, step: int) -> str:
    """Return the mark in the header of a state's objects; it makes them this state's own, shared with nothing."""
    return f"{run}/{stage}/{lease}/{step}"


def find_owner(objects: ObjectStore, sha256: str) -> str | None:
    """Return the owner's mark in an object's header; None when it has none."""
    return _owner(objects.read_header(sha256))


def ref_folder(manifest: Manifest) -> str:
    """Return the folder of refs that a manifest is committed in."""
    match manifest:
        case ArtifactManifest():
            return f"refs/artifacts/{manifest.fingerprint}"
        case DatasetManifest():
            return f"refs/datasets/{manifest.digest}"
        case StateManifest():
            return f"refs/states/{manifest.run}/{manifest.stage}"
        case RolloutsManifest():
            return f"{rollouts_folder(manifest.run, manifest.stage)}/{manifest.iteration:06d}"


def rollouts_folder(run: str, stage: str) -> str:
    """Return the folder of the refs of a stage's rollouts, one folder for each iteration."""
    return f"refs/rollouts/{run}/{stage}"


def named_manifest(objects: ObjectStore, folder: str, record: dict[str, Any]) -> Manifest:
    """Return the manifest that a ref of a folder names.

    Raises StoreDamaged when it is not whole or another's, StoreFormat when a later version wrote it.
    """
    sha256 = str(record["manifest"])
    data = objects.get_bytes(sha256)
    if record.get("bytes") != len(data):
        raise StoreDamaged(f"names {record.get('bytes')!r} bytes of {object_path(sha256)}, which has {len(data)}")
    try:
        manifest = read_manifest(data)
    except StoreFormat as error:
        raise StoreFormat(f"{folder}: {object_path(sha256)}: {error}") from None
    if ref_folder(manifest) != folder:
        raise StoreDamaged(f"names a manifest of {ref_folder(manifest)}, not of {folder}")
    return manifest


def wrong_objects(objects: ObjectStore, manifest: Manifest, entries: Iterable[FileEntry] | None = None) -> list[str]:
    """Say which objects a manifest may not name, or does not describe as they are.

    It may not name, being a state's, those that another owns, else those of training states. Of a state's objects the
    headers must bear out every slice: nothing is allocated for what is not there. `entries`: look at these only.
    """
    own: str | None = None
    slices: dict[str, list[tuple[str, Slice]]] = {}
    if isinstance(manifest, StateManifest):
        own = owner_mark(manifest.run, manifest.stage, manifest.lease, manifest.step)
        for tensor in (tensor for group in manifest.tensors.values() for tensor in group):
            for piece in tensor.slices:
                slices.setdefault(piece.object.sha256, []).append((tensor.dtype, piece))

    def look(entry: FileEntry) -> str | None:
        path = object_path(entry.sha256)
        try:
            text = objects.read_header(entry.sha256)
        except StoreDamaged as error:
            return str(error)
        owner = _owner(text)
        if owner != own:
            return f"{path} belongs to {f'the training state {owner}' if owner else 'no training state'}"
        problem = None if text is None or own is None else _misdescribed(text, entry.bytes, slices[entry.sha256])
        return None if problem is None else f"{path} {problem}"

    wanted = {entry.sha256: entry for entry in (objects_of(manifest) if entries is None else entries)}
    chosen = [wanted[sha256] for sha256 in sorted(wanted)]
    return [problem for problem in objects.ask(look, chosen) if problem is not None]


def check_belongings(objects: ObjectStore, manifest: Manifest) -> None:
    """Raise StoreDamaged when a manifest names an object that it may not, or not as it is."""
    wrong = wrong_objects(objects, manifest)
    if wrong:
        raise StoreDamaged(f"{ref_folder(manifest)} is wrong about {len(wrong)} of its objects: {wrong[0]}")


def _owner(header: bytes | None) -> str | None:
    if header is None:
        return None
    try:
        mark = json.loads(header)["__metadata__"]["owner"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return mark if isinstance(mark, str) and _MARK.fullmatch(mark) else None


def _misdescribed(header: bytes, size: int, slices: Iterable[tuple[str, Slice]]) -> str | None:
    """Say which slice an object of `size` bytes does not hold; None when it holds all, each once."""
    try:
        tensors = parse_header(header, size)
    except ValueError as error:
        return str(error)
    for dtype, piece in slices:
        found = tensors.pop(piece.key, None)
        if found is None:
            return f"has no tensor {piece.key[:100]!r}, or it is named twice"
        if (found["dtype"], found["shape"]) != (dtype, piece.shape):
            return f"holds {piece.key[:100]!r} as {found['dtype']} {found['shape']}, not {dtype} {piece.shape}"
    return None
