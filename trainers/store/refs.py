"""Numbered create-only files: the commit of everything. A number once written never changes; the highest counts."""

import json
import re
import secrets
from typing import Any

from recipes.errors import StoreDamaged
from trainers.store.manifest import FORMAT, canonical_json, check_format
from trainers.store.place import Files

QUARANTINE = "quarantine"
NUMBER = re.compile(r"[0-9]{6}|[1-9][0-9]{6,}")
"""The name of a ref's file; what else lies in a folder of refs is none."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def numbers_below(files: Files, root: str) -> dict[str, list[int]]:
    """Return the numbers in each folder of refs below a folder, ascending: one listing for all."""
    found: dict[str, list[int]] = {}
    for path in files.walk(root):
        folder, _, name = path.rpartition("/")
        if NUMBER.fullmatch(name):
            found.setdefault(folder, []).append(int(name))
    return {folder: sorted(numbers) for folder, numbers in found.items()}


class RefLog:
    """The numbered refs in one folder."""

    def __init__(self, files: Files, folder: str, listed: tuple[list[int], set[int]] | None = None) -> None:
        """`listed`: the numbers that are there, and those set aside, where somebody has just listed them."""
        self._files = files
        self.folder = folder
        self._listed = listed

    def numbers(self) -> list[int]:
        """Return the numbers that are there, ascending."""
        if self._listed is not None:
            return self._listed[0]
        return sorted(int(name) for name in self._files.names(self.folder) if NUMBER.fullmatch(name))

    def highest(self) -> int:
        """Return the highest number; 0 when there is none."""
        return max(self.numbers(), default=0)

    def exists(self, number: int) -> bool:
        """Tell whether a number is there."""
        try:
            return self._files.size(self.path(number)) is not None
        except StoreDamaged:  # there, and not readable
            return True

    def path(self, number: int) -> str:
        """Return where a number lies in the store."""
        return f"{self.folder}/{number:06d}"

    def create(self, number: int, content: dict[str, Any]) -> bool:
        """Write a number; False when it was taken before. The nonce makes equal refs of racing writers differ."""
        record = {"format": FORMAT, **content, "nonce": secrets.token_hex(8)}
        return self._files.create(self.path(number), canonical_json(record))

    def append(self, content: dict[str, Any]) -> int:
        """Write the next free number; returns it."""
        number = self.highest() + 1
        while not self.create(number, content):
            number += 1
        return number

    def read(self, number: int) -> dict[str, Any]:
        """Return what a number says.

        Raises StoreDamaged when it is unreadable, StoreFormat when a later version wrote it, FileNotFoundError when it
        is gone.
        """
        data = self._files.read(self.path(number))
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            raise StoreDamaged(f"{self.path(number)}: not JSON ({len(data)} bytes)") from None
        if not isinstance(record, dict):
            raise StoreDamaged(f"{self.path(number)}: not a ref but JSON of type {type(record).__name__}")
        check_format(record, f"{self.path(number)}: ref")
        for key in ("manifest", "fingerprint"):
            if key in record and not (isinstance(record[key], str) and _SHA256.fullmatch(record[key])):
                raise StoreDamaged(f"{self.path(number)}: {key} is {str(record[key])[:100]!r}, which is not a SHA-256")
        return record

    def set_aside(self, number: int, problem: str) -> str:
        """Note in `quarantine/` that a number is damaged, with what it says; it stays where it is and is passed over.

        Its number must stay taken, so that no stale writer finds it free. Returns the note's path.
        """
        try:
            text = self._files.read(self.path(number)).decode(errors="replace")
        except (FileNotFoundError, StoreDamaged):
            text = None
        note = f"{QUARANTINE}/{self.path(number)}"
        self._files.create(note, canonical_json({"format": FORMAT, "problem": problem, "ref": text}))
        return note

    def aside(self) -> set[int]:
        """Return the numbers that were set aside."""
        if self._listed is not None:
            return self._listed[1]
        names = self._files.names(f"{QUARANTINE}/{self.folder}")
        return {int(name) for name in names if NUMBER.fullmatch(name)}

    def settle(self, number: int) -> None:
        """Make a number durable, whoever wrote it."""
        self._files.settle(self.path(number))

    def remove(self, number: int) -> None:
        """Remove a number durably."""
        self._files.remove(self.path(number))
