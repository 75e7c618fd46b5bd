"""What a commit may name: a ref only its own folder's manifest, a training state only the objects written for it.

The header of each object of a training state carries its owner's mark, `run/stage/lease/step`. So a state shares no
object with another commit, and retention deletes a dropped state's objects without asking who else names them.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from recipes.errors import StoreDamaged
from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    FileEntry,
    Manifest,
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
    header = objects.read_header(sha256)
    if header is None:
        return None
    try:
        mark = json.loads(header)["__metadata__"]["owner"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return mark if isinstance(mark, str) and _MARK.fullmatch(mark) else None


def ref_folder(manifest: Manifest) -> str:
    """Return the folder of refs that a manifest is committed in."""
    match manifest:
        case ArtifactManifest():
            return f"refs/artifacts/{manifest.fingerprint}"
        case DatasetManifest():
            return f"refs/datasets/{manifest.digest}"
        case StateManifest():
            return f"refs/states/{manifest.run}/{manifest.stage}"


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


def foreign_objects(objects: ObjectStore, manifest: Manifest, entries: Iterable[FileEntry] | None = None) -> list[str]:
    """Say which objects a manifest may not name: of a state those that another owns, else those of training states.

    `entries`: look at these only.
    """
    own: str | None = None
    if isinstance(manifest, StateManifest):
        own = owner_mark(manifest.run, manifest.stage, manifest.lease, manifest.step)
    wanted = sorted({entry.sha256 for entry in (objects_of(manifest) if entries is None else entries)})
    with ThreadPoolExecutor(max_workers=16 if objects.is_remote else 1) as pool:
        owners = list(pool.map(lambda sha256: find_owner(objects, sha256), wanted))
    return [
        f"{object_path(sha256)} belongs to {f'the training state {owner}' if owner else 'no training state'}"
        for sha256, owner in zip(wanted, owners, strict=True)
        if owner != own
    ]


def check_belongings(objects: ObjectStore, manifest: Manifest) -> None:
    """Raise StoreDamaged when a manifest names an object that it may not."""
    foreign = foreign_objects(objects, manifest)
    if foreign:
        raise StoreDamaged(f"{ref_folder(manifest)} may not name {len(foreign)} of its objects: {foreign[0]}")
