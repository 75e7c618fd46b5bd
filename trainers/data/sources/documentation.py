"""The documentation of the running Python installation: python-docs, and the summaries of it."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.data.text import PythonDocs, PythonSummaries
from recipes.problem_codes import Code
from trainers.data.demo.python_docs import Entry, python_docs_digest, read_entries, read_module
from trainers.data.demo.python_docs_sets import build_sets
from trainers.data.demo.python_docs_summaries import build_summaries, summaries_digest
from trainers.data.row_forms import RowRole
from trainers.data.sources.reader import Part, RawRow, SourceError
from trainers.store.manifest import DatasetManifest
from trainers.store.store import Store

FIRST_MODULES = ("textwrap", "heapq")
"""Modules whose rows are the first ones: reading the whole documentation takes seconds."""
Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class DocsReader:
    """Reads python-docs, which has a set for each role."""

    source: PythonDocs
    role: RowRole
    store: Store | None = None
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the split."""
        yield Part("source", self._read)

    def digest(self) -> str:
        """Hash the source files of the documentation."""
        return python_docs_digest()

    def files(self) -> None:
        """Every installation has them."""

    def _read(self, limit: int | None) -> Iterator[RawRow]:
        if self.role not in ROLE_SETS:
            raise SourceError(
                Code.UNSUITABLE_SOURCE, "rows of this source have no images", "use jsonl, csv, parquet or datasets"
            )
        made = ROLE_SETS[self.role]
        for name, row in _rows(_content(f"{made.name}.{self.source.split}.jsonl", limit, _DOCS, self.store)):
            for part, found in made.rows(name, row):
                yield RawRow(part, f"{self.source.source}: {part}", found, Path(), is_canonical=made.is_canonical)


@dataclass(frozen=True, slots=True)
class SummariesReader:
    """Reads the summaries of python-docs."""

    source: PythonSummaries
    store: Store | None = None
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the split."""
        yield Part("source", self._read)

    def digest(self) -> str:
        """Hash the source files of the documentation."""
        return summaries_digest()

    def files(self) -> None:
        """Every installation has them."""

    def _read(self, limit: int | None) -> Iterator[RawRow]:
        for name, row in _rows(_content(f"summaries.{self.source.split}.jsonl", limit, _SUMMARIES, self.store)):
            yield RawRow(name, f"{self.source.source}: {name}", row, Path())


def _answers(name: str, pair: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield both answers of a pair with their verdicts."""
    for side in ("chosen", "rejected"):
        yield f"{name}:{side}", {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}


def _rows(content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in content.splitlines():
        row = json.loads(line)
        yield row.pop("id"), row


def _same(name: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield name, row


def _described_kind(name: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Turn a question about the documentation into its answer, labelled with the kind of thing that it describes."""
    question, answer = (message["content"] for message in row["messages"])
    found = re.match(r"What is the (\w+) ", question)
    yield name, {"text": answer, "label": found[1] if found else "function"}


@dataclass(frozen=True, slots=True)
class _Set:
    """A set of python-docs, and how its rows become rows of a role."""

    name: str
    rows: Callable[[str, dict[str, Any]], Iterator[tuple[str, dict[str, Any]]]] = _same
    is_canonical: bool = True
    """Whether they are in the role's form already."""


ROLE_SETS: dict[RowRole, _Set] = {
    "text": _Set("text"),
    "instructions": _Set("instructions"),
    "labels": _Set("instructions", _described_kind),
    "seq2seq": _Set("instructions", is_canonical=False),
    "preferences": _Set("preferences"),
    "judged": _Set("preferences", _answers),
    "prompts": _Set("prompts"),
}
"""What rows of each role are made from."""


@dataclass(frozen=True, slots=True)
class _Extraction:
    """How files are made from the documentation, and what they follow from."""

    digest: Callable[[], str]
    build: Callable[[list[Entry]], Files]


def _docs_files(entries: list[Entry]) -> Files:
    sets = build_sets(entries)
    return sets.files() | {"counts.json": json.dumps(sets.counts, sort_keys=True).encode()}


def _summaries_files(entries: list[Entry]) -> Files:
    files = build_summaries(entries)
    counts = {name.removesuffix(".jsonl"): content.count(b"\n") for name, content in files.items()}
    return files | {"counts.json": json.dumps(counts, sort_keys=True).encode()}


_DOCS = _Extraction(python_docs_digest, _docs_files)
_SUMMARIES = _Extraction(summaries_digest, _summaries_files)


def _content(name: str, limit: int | None, extraction: _Extraction, store: Store | None) -> bytes:
    """Return one of the files, from the store where it is there already; of a few modules where rows are limited."""
    if limit is not None:
        files = _first_files(extraction.build)
        prefix = name.partition(".")[0]
        return b"".join(content for name, content in files.items() if name.partition(".")[0] == prefix)
    digest = extraction.digest()
    if store is None:
        return _extract(extraction.build, digest)[name]
    manifest = store.find_dataset(digest)
    if manifest is None:
        files = _extract(extraction.build, digest)
        with tempfile.TemporaryDirectory(prefix="trainwright-python-docs-") as folder:
            for file_name, content in files.items():
                (Path(folder) / file_name).write_bytes(content)
            entries = store.objects.put_folder(Path(folder))
        store.put_dataset(DatasetManifest(digest=digest, files=entries, report=json.loads(files["counts.json"])))
        return files[name]
    return store.objects.get_bytes(manifest.files[name].sha256)


@lru_cache(maxsize=2)
def _extract(build: Callable[[list[Entry]], Files], digest: str) -> Files:
    """Read the documentation; `digest` is that of the sources as they stand."""
    return build(read_entries())


@lru_cache(maxsize=2)
def _first_files(build: Callable[[list[Entry]], Files]) -> Files:
    return build([entry for module in FIRST_MODULES for entry in read_module(module)])
