"""Local files by paths and patterns: found, opened, hashed; errors name the key, the file and the line."""

import codecs
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.sources.archives import SEPARATOR, SUFFIXES, is_archive, place_of, unpack
from trainers.data.sources.packed import PACKED_ERRORS, open_packed
from trainers.data.sources.reader import Part, RawRow, SourceError, reason

MAX_FILES = 10_000
Found = tuple[str, Path | SourceError]
"""The key that names a file, for example `files.0`, with the file, or with what is wrong there."""
ReadFile = Callable[[Path, int | None], Iterator[RawRow]]


def find_each(patterns: list[str], base_dir: Path, key: str = "files") -> list[Found]:
    """Look for every file in the order of the patterns, a pattern's own sorted."""
    found: list[Found] = []
    for index, pattern in enumerate(patterns):
        field = f"{key}.{index}"
        try:
            found += [(field, path) for path in _matches(pattern, base_dir)]
        except SourceError as error:
            found.append((field, error.at(field)))
    return found


def find_sorted(patterns: list[str], base_dir: Path) -> list[Found]:
    """Look for every file, each once, in the order of their paths; what is not there comes first."""
    by_path: dict[Path, str] = {}
    missing: list[Found] = []
    for field, path in find_each(patterns, base_dir):
        if isinstance(path, SourceError):
            missing.append((field, path))
        else:
            by_path.setdefault(path, field)
    return [*missing, *((by_path[path], path) for path in sorted(by_path, key=place_of))]


def require(found: Iterable[Found]) -> list[Path]:
    """Return the files; raises the SourceError of the first one that is not there."""
    paths = []
    for _, path in found:
        if isinstance(path, SourceError):
            raise path
        paths.append(path)
    return paths


def file_parts(found: Iterable[Found], read: ReadFile) -> Iterator[Part]:
    """Yield a part for every file."""
    for field, path in found:
        if isinstance(path, SourceError):
            yield Part(field, partial(_refuse, path))
        else:
            yield Part(field, partial(_read_file, read, path), path)


def files_digest(paths: Iterable[Path]) -> str:
    """Return 64 hex digits over the files' bytes in order."""
    digest = hashlib.sha256()
    for path in paths:
        with naming_file(path), open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def match_files(pattern: str, base_dir: Path) -> list[Path]:
    """Return the files that a path or glob pattern names, sorted; relative patterns start at `base_dir`.

    A file of just this name comes before what it would match as a pattern. Hidden files are matched by patterns that
    say so.
    """
    path = Path(pattern)
    file = path if path.is_absolute() else base_dir / path
    if not _is_pattern(pattern) or file.exists():
        return [file] if file.exists() else []
    root, relative = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (base_dir, path)
    found = []
    for file in root.glob(str(relative)):
        if file.is_file() and not _is_hidden(file, root, relative):
            found.append(file)
        if len(found) > MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files match")
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is there for a system or a tool: `.ipynb_checkpoints`, `._a.png`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open UTF-8 text, or UTF-16 that a byte order mark announces; a mark is passed over.

    Other bytes raise SourceError with their line.
    """
    with open_packed(path) as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with io.TextIOWrapper(open_packed(path), encoding=encoding, newline="") as file:
        try:
            yield file
        except UnicodeDecodeError:
            raise SourceError(Code.NOT_UTF8, f"{_bad_byte(path)} is not UTF-8 text", "convert it to UTF-8") from None


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into SourceError."""
    try:
        yield
    except PACKED_ERRORS as error:
        raise SourceError(Code.UNREADABLE_DATA, f"{path} cannot be read: {reason(error)}") from None


def _matches(pattern: str, base_dir: Path) -> list[Path]:
    if pattern.startswith("~") or "://" in pattern or "$" in pattern:
        raise SourceError(Code.INVALID_PATH, "expected a path or a glob pattern; '~', '$' and URLs are not expanded")
    outer, separator, inner = pattern.partition(SEPARATOR)
    found = _matching_files(outer if separator else pattern, base_dir)
    return [member for path in found for member in _members(path, inner or "**/*", bool(separator))]


def _members(path: Path, pattern: str, is_named: bool) -> list[Path]:
    """Return the files of an archive that match; any other file is itself."""
    if not is_archive(path):
        if is_named:
            raise SourceError(Code.INVALID_PATH, f"{path} is no archive", f"only {' '.join(SUFFIXES)} hold members")
        return [path]
    found = match_files(pattern, unpack(path))
    if not found:
        names = [member.relative_to(unpack(path)).as_posix() for member in match_files("**/*", unpack(path))]
        there = f"it holds {', '.join(names[:8]) or 'nothing'}"
        raise SourceError(Code.MISSING_FILE, f"{path} holds no file that matches {pattern}", there)
    return found


def _matching_files(pattern: str, base_dir: Path) -> list[Path]:
    try:
        matches = match_files(pattern, base_dir)
    except (OSError, ValueError, NotImplementedError) as error:
        raise SourceError(Code.INVALID_PATH, f"not a usable pattern ({error})") from None
    if not matches and _is_pattern(pattern):
        raise SourceError(Code.MISSING_FILE, f"no file matches {pattern}", f"looked in {base_dir.resolve()}")
    if not matches:
        raise SourceError(Code.MISSING_FILE, f"there is no such file: {pattern}", _nearby(pattern, base_dir))
    for path in matches:
        if path.is_dir():
            raise SourceError(Code.INVALID_PATH, f"{path} is a folder", f"did you mean {pattern.rstrip('/')}/*?")
        if not path.is_file():
            raise SourceError(Code.INVALID_PATH, f"{path} is no regular file")
    return matches


def _nearby(pattern: str, base_dir: Path) -> str:
    folder = base_dir / Path(pattern).parent
    names = sorted(os.listdir(folder))[:1000] if folder.is_dir() else []
    guess = nearest(Path(pattern).name, names) if names else None
    return f"did you mean {Path(pattern).parent / guess}?" if guess else f"looked in {folder.resolve()}"


def _is_hidden(file: Path, root: Path, pattern: Path) -> bool:
    """Tell whether a match lies in something hidden that the pattern does not name."""
    named = set(pattern.parts)
    says_so = any(part.startswith(".") for part in named)
    return not says_so and any(is_hidden(part) for part in file.relative_to(root).parts if part not in named)


def _is_pattern(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _refuse(error: SourceError, limit: int | None) -> NoReturn:
    raise error


def _read_file(read: ReadFile, path: Path, limit: int | None) -> Iterator[RawRow]:
    with naming_file(path):
        yield from read(path, limit)


def _bad_byte(path: Path) -> str:
    """Find the line of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_packed(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                decoder.decode(line)
            except UnicodeDecodeError as error:
                return f"{path}:{number} (byte 0x{error.object[error.start]:02x})"
    return f"{path} (its last character is cut off)"
