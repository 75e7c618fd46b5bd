"""Local folders that show an artifact's files as ordinary files, for libraries that open folders."""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from recipes.errors import RequestError
from trainers.store.manifest import FileEntry, files_digest, sha256_hex
from trainers.store.objects import ObjectStore
from trainers.store.place import writing


def files_under(files: Mapping[str, FileEntry], prefix: str) -> dict[str, FileEntry]:
    """Return the files below `prefix/` by their name there; all of them for an empty prefix."""
    start = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    return {name[len(start) :]: entry for name, entry in files.items() if name.startswith(start)}


def folder(
    objects: ObjectStore, uri: str, files: Mapping[str, FileEntry], prefix: str, into: Path | None = None
) -> Path:
    """Return a folder of links to verified objects: in the cache, or copies at `into`, which must be empty."""
    wanted = files_under(files, prefix)
    if not wanted:
        raise RequestError(f"the artifact has no files under {prefix!r}; it has {', '.join(sorted(files)[:20])}")
    sources = {name: objects.local_path(entry.sha256) for name, entry in sorted(wanted.items())}
    if into is None:
        target = objects.cache / "folders" / sha256_hex(f"{uri}\n{files_digest(wanted)}".encode())[:32]
        if all(_points_at(target / name, source) for name, source in sources.items()):
            return target
    else:
        target = into.absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RequestError(f"{target} exists and is not empty")
    with writing(target):
        _build(target, sources, is_copy=into is not None)
    return target


def _build(target: Path, sources: Mapping[str, Path], *, is_copy: bool) -> None:
    """Make the folder beside its place and move it there whole."""
    building = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        for name, source in sources.items():
            place = building / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if is_copy:
                shutil.copyfile(source, place)
            else:
                place.symlink_to(source)
        try:
            if is_copy and target.exists():
                target.rmdir()
            os.rename(building, target)
        except OSError:
            # Another process put the same folder there; one that points elsewhere is replaced.
            if is_copy:
                raise
            if not all(_points_at(target / name, source) for name, source in sources.items()):
                os.rename(target, building.with_name(f"{building.name}.old"))
                os.rename(building, target)
                shutil.rmtree(building.with_name(f"{building.name}.old"), ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _points_at(link: Path, source: Path) -> bool:
    try:
        return os.readlink(link) == str(source)
    except OSError:
        return False
