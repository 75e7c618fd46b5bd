"""What every source is to the rest of the code: its rows part by part, its identity, the files that it reads."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from recipes.data.selection import Member
from recipes.errors import RequestError
from recipes.problem_codes import Code


class SourceError(RequestError):
    """A source that cannot be read: what is wrong, what would be right, and which key of the source says it."""

    def __init__(self, code: Code, message: str, suggestion: str = "", field: str = "") -> None:
        super().__init__(code, message, suggestion, field)
        self.code = code
        self.codes = (code,)
        self.message = message
        self.suggestion = suggestion
        self.field = field

    def __str__(self) -> str:
        return f"{self.message}; {self.suggestion}" if self.suggestion else self.message

    def at(self, field: str) -> "SourceError":
        """Return the error at a key of the source, unless it names one."""
        return SourceError(self.code, self.message, self.suggestion, self.field or field)

    def within(self, member: Member[Any]) -> "SourceError":
        """Return the error as one of a source that a mixture may name."""
        if not member.name:
            return self
        return SourceError(self.code, f"{member.name}: {self.message}", self.suggestion, f"{member.field}{self.field}")


@dataclass(slots=True)
class RawRow:
    """One row as its file has it."""

    id: str
    """File and row, for example `train.jsonl:17`."""
    place: str
    """The same for messages, with the file's whole path."""
    columns: dict[str, Any]
    folder: Path
    """Where relative paths that the row names start."""
    is_canonical: bool = False
    """Whether the columns have their role's form already."""
    form: str = ""
    """How the file was read, where its source does not say it."""


@contextmanager
def naming_member(member: Member[Any]) -> Iterator[None]:
    """Name the source of a mixture in errors."""
    try:
        yield
    except SourceError as error:
        raise error.within(member) from None


ReadRows = Callable[[int | None], Iterator[RawRow]]
"""Yields rows; told how many are wanted (None: all), so that no more than those need to be read."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a source, or all of it where it has no files."""

    field: str
    """Key of the source that names it, for example `files.0`."""
    read: ReadRows
    path: Path = Path()
    """The file, where it is one."""

    def rows(self, limit: int | None = None) -> Iterator[RawRow]:
        """Yield at most so many rows; raises SourceError, which names the key."""
        try:
            yield from islice(self.read(limit), limit)
        except SourceError as error:
            raise error.at(self.field) from None


@dataclass(frozen=True, slots=True)
class RowFiles:
    """Files of rows by the key `files`, with the files that their rows name, as they name them."""

    paths: list[Path]
    named: Mapping[Path, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ListedFiles:
    """Files by their keys; their order counts."""

    by_key: dict[str, list[Path]]


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Files of a folder that the key `path` names."""

    folder: Path
    paths: list[Path]
    other_keys: dict[str, Any] = field(default_factory=dict)
    """What further keys say once the folder has been copied elsewhere."""


LocalFiles = RowFiles | ListedFiles | FolderFiles


class Reader(Protocol):
    """One source, read. Checking, training, digests and uploads all go through it."""

    def parts(self) -> Iterator[Part]:
        """Yield the parts in the order of the rows; one that is not there raises SourceError when it is read."""

    def digest(self) -> str:
        """Return 64 hex digits that change when the rows can change; raises SourceError for missing files.

        Reads files, decodes no rows. Names of files do not count where their order follows from the recipe.
        """

    def files(self) -> LocalFiles | None:
        """Return the local files; None for what every installation has, or the hub. Raises SourceError."""

    @property
    def is_remote(self) -> bool:
        """Whether the rows are fetched from the hub when they are read."""


def read_all(reader: Reader, limit: int | None = None) -> Iterator[RawRow]:
    """Yield the rows of every part, or at most the first `limit` of them all; raises SourceError."""
    parts = reader.parts()
    rows = (row for part in parts for row in part.rows(limit))
    return islice(rows, limit)


def reason(error: Exception) -> str:
    """Say what the system says of a file, without its name."""
    return str(getattr(error, "strerror", None) or error)


def columns_there(names: Iterable[Any]) -> str:
    """Name the columns that a row or a file has, for messages."""
    return "columns there: " + (", ".join([repr(name) for name in names][:12]) or "none")
