"""Zip and tar archives as folders: unpacked once into the cache folder, where only the user can read them."""

import hashlib
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from recipes.problem_codes import Code
from trainers.data.sources.packed import PACKED_ERRORS, open_packed
from trainers.data.sources.reader import SourceError, reason
from trainers.store.objects import cache_folder

SUFFIXES = (".zip", ".tar", ".tgz", *(f".tar.{packing}" for packing in ("gz", "bz2", "xz", "zst")))
SEPARATOR = "::"
"""Stands between an archive and the pattern of its members: `reviews.zip::train/*.jsonl`."""


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file is an archive."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def unpack(archive: Path) -> Path:
    """Return the folder with an archive's members; one that has changed is unpacked again. Raises SourceError."""
    path = archive.resolve()
    about = path.stat()
    state = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    place = _home() / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}-{state}"
    folder = place / archive.name
    if folder.is_dir():
        return folder
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=place.parent))  # for its user alone
    try:
        _extract(path, partial / archive.name)
        try:
            partial.rename(place)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    except (*PACKED_ERRORS, tarfile.TarError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise SourceError(Code.UNREADABLE_DATA, f"{archive} cannot be unpacked: {reason(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def place_of(path: Path) -> str:
    """Return by what a file is sorted: its path, or its archive's name and its place in there."""
    home = _home()
    return "/".join(path.relative_to(home).parts[1:]) if path.is_relative_to(home) else path.as_posix()


def _home() -> Path:
    return cache_folder().resolve() / "archives"


def _extract(archive: Path, folder: Path) -> None:
    folder.mkdir()
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as members:
            members.extractall(folder)
        return
    with open_packed(archive) as file, tarfile.open(fileobj=file, mode="r|") as members:
        members.extractall(folder, filter="data")
