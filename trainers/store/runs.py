"""A run's folder: documents written once, and journals, metrics, samples and logs as numbered segments per writer."""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from recipes.errors import RequestError, StoreDamaged
from trainers.store.background_threads import map_requests
from trainers.store.manifest import FORMAT, canonical_json
from trainers.store.place import Files

SEGMENT_BYTES = 1 << 20
"""A writer publishes a segment by itself when this much has gathered."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-(\d{8}-\d{6}-[0-9a-f]{4})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_SEGMENT = re.compile(r"(\d{6,})\.jsonl")


def segment_name(number: int) -> str:
    """Return the name of a writer's segment."""
    return f"{number:06d}.jsonl"


class SegmentWriter:
    """Appends JSON lines; what was flushed is durable, and no other writer's lines are ever in between."""

    def __init__(self, files: Files, folder: str, durable: bool) -> None:
        self._files = files
        self._folder = folder
        self._durable = durable
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._number: int | None = None

    @property
    def has_lines(self) -> bool:
        """Whether there are lines that are not published yet."""
        return bool(self._lines)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line to the buffer."""
        data = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._lines.append(data)
        self._num_bytes += len(data)
        if self._num_bytes >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Publish the buffer as the next segment; nothing when it is empty."""
        if not self._lines:
            return
        if self._number is None:
            self._number = max(_segment_numbers(self._files, self._folder), default=0) + 1
        data = b"".join(self._lines)
        while not self._files.create(f"{self._folder}/{segment_name(self._number)}", data, durable=self._durable):
            self._number += 1
        self._number += 1
        self._lines, self._num_bytes = [], 0


class Run:
    """One run's folder in the store."""

    def __init__(self, files: Files, run_id: str) -> None:
        self._files = files
        self.id = run_id
        self._root = f"runs/{run_id}"

    def __str__(self) -> str:
        return f"{self._files.uri}/{self._root}"

    def exists(self) -> bool:
        """Tell whether the run was taken."""
        return self._files.size(f"{self._root}/run.json") is not None

    def write_once(self, name: str, data: bytes) -> None:
        """Write a document; the same bytes again are no error, other bytes are refused."""
        path = self._path(name)
        if not self._files.create(path, data) and self._files.read(path) != data:
            raise RequestError(f"run {self.id} has another {name} already")

    def find(self, name: str) -> bytes | None:
        """Return a document; None: there is none."""
        try:
            return self._files.read(self._path(name))
        except FileNotFoundError:
            return None

    def find_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Return documents as `find` does, asked for at once."""
        return list(map_requests(self.find, names, self._files))

    def names(self, name: str) -> list[str]:
        """Return the sorted names in a folder."""
        return self._files.names(self._path(name))

    def read(self, name: str) -> bytes:
        """Return a document."""
        data = self.find(name)
        if data is None:
            raise RequestError(f"run {self.id} has no {name}")
        return data

    def writer(self, path: str, *, durable: bool = True) -> SegmentWriter:
        """Return a writer of segments under `path`; each writer has a path of its own, as metrics/base/3."""
        return SegmentWriter(self._files, self._path(path), durable)

    def read_lines(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Give the lines of every writer at or below a path, in the order of paths and segments."""
        return self.lines(self.segments(prefix))

    def lines(self, segments: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Give the lines of segments, which are read at once where each is a request."""

        def read(path: str) -> tuple[str, bytes]:
            try:
                return path, self._files.read(path)
            except FileNotFoundError:
                return path, b""

        for path, data in map_requests(read, segments, self._files):
            for line in data.splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    raise StoreDamaged(f"store {self._files.uri}: {path} has a line that is not JSON") from None

    def segments(self, prefix: str) -> list[str]:
        """Return the paths in the store of all segments at or below a path."""
        found = []
        for path in self._files.walk(self._path(prefix)):
            folder, _, name = path.rpartition("/")
            match = _SEGMENT.fullmatch(name)
            if match:
                found.append((folder, int(match.group(1)), path))
        return [path for _, _, path in sorted(found)]

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name in a run's folder")
        return f"{self._root}/{name}"


def new_run(files: Files, recipe_name: str) -> Run:
    """Take a run id that nobody else has: <recipe-name>-<utc yyyymmdd-hhmmss>-<4 hex, the fraction of the second>."""
    while True:
        at = datetime.now(UTC)
        run = Run(files, f"{recipe_name}-{at:%Y%m%d-%H%M%S}-{at.microsecond * 0x10000 // 1_000_000:04x}")
        record = {"format": FORMAT, "run": run.id, "recipe": recipe_name, "created_at": at.isoformat()}
        if files.create(f"runs/{run.id}/run.json", canonical_json({**record, "nonce": secrets.token_hex(8)})):
            return run


def list_runs(files: Files) -> list[str]:
    """Return the ids of all runs, oldest first."""
    matches = [match for name in files.names("runs") if (match := _ID.fullmatch(name))]
    return [match.string for match in sorted(matches, key=lambda match: (match.group(1), match.string))]


def _segment_numbers(files: Files, folder: str) -> list[int]:
    matches = (_SEGMENT.fullmatch(name) for name in files.names(folder))
    return [int(match.group(1)) for match in matches if match]
