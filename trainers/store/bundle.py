"""Artifacts as a folder that can be carried anywhere and taken into another store, every byte checked by its hash.

    bundle.json                  {"format": 1, "type": "bundle", "artifacts": {fingerprint: hash of the manifest}}
    objects/08/b2338301c6de...   manifests and files, named by their SHA-256 as in a store

No archive format is involved. A bundle from others is data to be distrusted: a link, a special file, a name that is not
one of these, a file that nothing names, content of a kind that could be code or is not what its name says: each is
refused by name, before anything is committed.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from recipes.errors import RequestError, StoreDamaged
from trainers.store.import_records import note_origin
from trainers.store.local_files import LocalFiles
from trainers.store.manifest import (
    FORMAT,
    ArtifactManifest,
    StoreFormat,
    canonical_json,
    manifest_bytes,
    read_manifest,
    sha256_hex,
)
from trainers.store.objects import ObjectStore, object_path
from trainers.store.place import demand_empty, hash_file
from trainers.store.store import Store
from trainers.store.untrusted_files import MAX_TEXT_BYTES, parse_json, read_safetensors_header, refuse_code

INDEX = "bundle.json"
PNG = b"\x89PNG\r\n\x1a\n"
_OBJECT = re.compile(r"objects/[0-9a-f]{2}/[0-9a-f]{62}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def write_bundle(store: Store, manifests: Iterable[ArtifactManifest], folder: Path) -> list[ArtifactManifest]:
    """Write artifacts, parents first, to a new or empty folder; returns what was written."""
    target = folder.absolute()
    demand_empty(target)
    files = LocalFiles(target)
    objects = ObjectStore(files)
    written: dict[str, ArtifactManifest] = {}
    for manifest in manifests:
        for entry in manifest.files.values():
            found = files.put_file(store.objects.local_path(entry.sha256), object_path)
            if found != entry:
                raise StoreDamaged(f"store {store.uri}: {object_path(entry.sha256)} changed while it was read")
        objects.put_bytes(manifest_bytes(manifest))
        written[manifest.fingerprint] = manifest
    index = {fingerprint: sha256_hex(manifest_bytes(manifest)) for fingerprint, manifest in written.items()}
    files.create(INDEX, canonical_json({"format": FORMAT, "type": "bundle", "artifacts": index}))
    shutil.rmtree(target / "tmp", ignore_errors=True)
    return list(written.values())


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder looks like a bundle."""
    return os.path.lexists(folder / INDEX)


def read_bundle(
    store: Store, folder: Path, digest: str | None = None, *, source: str | None = None
) -> list[ArtifactManifest]:
    """Check a bundle whole, then commit its artifacts, parents first; returns what the store holds of them.

    With `digest` one of the artifacts must have it. `source` is where it came from and is recorded of each, with the
    hash of the bundle's index; without it the folder's own name. Raises RequestError for what is refused,
    StoreDamaged for bytes that are not those that their name promises.
    """
    folder = folder.absolute()
    names = _names(folder)
    manifests = _manifests(folder, names)
    index = sha256_hex((folder / INDEX).read_bytes())
    if digest is not None and digest not in {manifest.digest for manifest in manifests}:
        found = ", ".join(f"{manifest.stage} {manifest.digest}" for manifest in manifests)
        raise RequestError(f"{folder} holds no artifact of digest {digest}; it holds {found}")
    for manifest in manifests:
        for name, entry in sorted(manifest.files.items()):
            path = folder / object_path(entry.sha256)
            if hash_file(path) != entry:
                raise StoreDamaged(f"{path}: not the bytes of {name} of {manifest.stage} that its name promises")
            _check_content(path, name)
    committed = []
    for manifest in manifests:
        for entry in manifest.files.values():
            if store.objects.put_file(folder / object_path(entry.sha256)) != entry:
                raise StoreDamaged(f"{folder / object_path(entry.sha256)} changed while it was read")
        held = store.put_artifact(manifest).manifest
        if held.digest != manifest.digest:
            raise RequestError(
                f"store {store.uri} holds {manifest.stage} {manifest.fingerprint[:16]} with digest {held.digest[:16]}; "
                f"the bundle's has {manifest.digest[:16]} and was not taken"
            )
        note_origin(store.files, held.fingerprint, source or folder.name, index)
        committed.append(held)
    return committed


def _names(folder: Path) -> set[str]:
    """Return the relative names of all files; refuses links, special files and names that a bundle has not."""
    if folder.is_symlink() or not folder.is_dir():
        raise RequestError(f"{folder} is not a folder")
    found: set[str] = set()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat()
            if stat.S_ISLNK(mode.st_mode):
                raise RequestError(f"{path} is a link; a bundle has none")
            if name in folders:
                if relative != "objects" and not re.fullmatch(r"objects/[0-9a-f]{2}", relative):
                    raise RequestError(f"{path} is a folder that a bundle does not have")
                continue
            if not stat.S_ISREG(mode.st_mode):
                raise RequestError(f"{path} is not a regular file")
            if mode.st_nlink != 1:
                raise RequestError(f"{path} is a hard link; copy the bundle as it is (cp -r) and import the copy")
            if relative != INDEX and not _OBJECT.fullmatch(relative):
                raise RequestError(f"{path} is no part of a bundle")
            found.add(relative)
    if INDEX not in found:
        raise RequestError(f"{folder} has no {INDEX}")
    return found


def _manifests(folder: Path, names: set[str]) -> list[ArtifactManifest]:
    """Read index and manifests; every file must be named by one of them, and everything named must be there."""
    place = folder / INDEX
    if place.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError(f"{place} is larger than {MAX_TEXT_BYTES} bytes")
    index = parse_json(place.read_bytes(), place)
    if not isinstance(index, dict) or index.get("type") != "bundle" or not isinstance(index.get("artifacts"), dict):
        raise RequestError(f"{place} is not the index of a bundle")
    if index.get("format") != FORMAT:
        raise RequestError(f"{place} is of format {index.get('format')!r}; this version reads format {FORMAT}")
    manifests: dict[str, ArtifactManifest] = {}
    expected = {INDEX}
    for fingerprint, sha in index["artifacts"].items():
        if not all(isinstance(text, str) and _FINGERPRINT.fullmatch(text) for text in (fingerprint, sha)):
            raise RequestError(f"{place}: {fingerprint!r} -> {sha!r} is not a fingerprint and a hash")
        manifests[fingerprint] = _manifest(folder, names, fingerprint, sha)
        entries = manifests[fingerprint].files.values()
        expected |= {object_path(sha), *(object_path(entry.sha256) for entry in entries)}
    for missing in sorted(expected - names):
        raise StoreDamaged(f"{folder / missing} is missing")
    for extra in sorted(names - expected):
        raise RequestError(f"{folder / extra} is named by no manifest of the bundle")
    ordered: dict[str, ArtifactManifest] = {}
    while manifests:
        ready = [
            item for item in manifests.values() if not any(p.fingerprint in manifests for p in item.parents.values())
        ]
        if not ready:
            raise RequestError(f"{place}: artifacts that were made from each other: {', '.join(sorted(manifests))}")
        for item in ready:
            ordered[item.fingerprint] = manifests.pop(item.fingerprint)
    return list(ordered.values())


def _manifest(folder: Path, names: set[str], fingerprint: str, sha: str) -> ArtifactManifest:
    path = folder / object_path(sha)
    if object_path(sha) not in names:
        raise StoreDamaged(f"{path} is missing")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError(f"{path} is larger than {MAX_TEXT_BYTES} bytes")
    data = path.read_bytes()
    if sha256_hex(data) != sha:
        raise StoreDamaged(f"{path}: not the bytes that its name promises")
    try:
        manifest = read_manifest(data)
    except (StoreDamaged, StoreFormat) as error:
        raise RequestError(f"{path}: {error}") from None
    if not isinstance(manifest, ArtifactManifest) or manifest.fingerprint != fingerprint:
        raise RequestError(f"{path} is not the manifest of artifact {fingerprint[:16]}")
    if manifest_bytes(manifest) != data:
        raise RequestError(f"{path} is not in canonical form")
    return manifest


def _check_content(path: Path, name: str) -> None:
    """Demand that a file is what its name says, and of a kind that is never run; raises RequestError."""
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        read_safetensors_header(path)
    elif suffix == ".png":
        with path.open("rb") as file:
            if file.read(len(PNG)) != PNG:
                raise RequestError(f"{path}: {name} is no PNG image")
    elif suffix in (".json", ".jsonl", ".jinja", ".txt", ".md"):
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise RequestError(f"{path}: {name} is larger than {MAX_TEXT_BYTES} bytes")
        data = path.read_bytes()
        if b"\0" in data:
            raise RequestError(f"{path}: {name} is not text")
        try:
            data.decode()
        except UnicodeDecodeError:
            raise RequestError(f"{path}: {name} is not text") from None
        if suffix == ".json":
            refuse_code(path.parent, parse_json(data, path), f"{path.name} ({name})")
    else:
        raise RequestError(f"{path}: {name} is of a kind that is not taken: it could be code when it is opened")
