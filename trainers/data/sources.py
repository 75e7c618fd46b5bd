"""Sources of rows: python-docs, files and `datasets`, with part, limit and hold_out applied."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.data.text import Datasets, DatasetsPlace, PythonDocs, PythonSummaries, Source
from recipes.errors import RequestError
from trainers.data.columns import BadRow, RowRole, canonical
from trainers.data.demo.python_docs import python_docs_digest, read_entries
from trainers.data.demo.python_docs_sets import build_sets
from trainers.data.demo.python_docs_summaries import build_summaries, summaries_digest
from trainers.data.files import files_digest, find_files, read_file
from trainers.data.row_images import open_pictures, with_encoded_pictures
from trainers.data.selection import select
from trainers.store.manifest import DatasetManifest
from trainers.store.store import Store


@dataclass(frozen=True, slots=True)
class Row:
    """One row in its role's form (`columns.canonical`), and where it came from."""

    id: str
    """File and row, for example `train.jsonl:17`; for python-docs the dotted name."""
    columns: dict[str, Any]

    def key(self) -> bytes:
        """Return what part and hold_out go by: the prompt where there is one, else the row without its label.

        So stages that read the same rows in different roles keep the same ones away from training.
        """
        columns = self.columns
        if "messages" in columns:
            messages = columns["messages"]
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            shared: Any = messages[: turns[0]] if turns and turns[0] else messages
        else:
            shared = columns.get("prompt") or {name: value for name, value in columns.items() if name != "label"}
        if "images" in columns:
            shared = [shared, columns["images"]]
        return hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode()).digest()


def source_digest(source: Source, base_dir: Path) -> str:
    """Return 64 hex digits that change when the rows of the source can change; reads files, never rows.

    Names of files do not count, their bytes and their order do. Raises RequestError for missing files.
    """
    match source:
        case PythonDocs():
            return python_docs_digest()
        case PythonSummaries():
            return summaries_digest()
        case Datasets():
            return datasets_digest(source, base_dir)
        case _:
            return files_digest(find_files(source.files, base_dir))


def read_rows(
    source: Source, base_dir: Path, role: RowRole, seed: int, *, held_out: bool = False, store: Store | None = None
) -> Iterator[Row]:
    """Yield the selected rows in source order; raises RequestError naming file and row of anything unreadable.

    First hold_out (or, with `held_out`, only what it keeps away), then part, then limit. `store` keeps what was
    extracted from python-docs, so that its sources are read once.
    """

    return select(lambda: unselected_rows(source, base_dir, role, store), source, seed, held_out=held_out)


def unselected_rows(source: Source, base_dir: Path, role: RowRole, store: Store | None = None) -> Iterator[Row]:
    """Yield every row in source order, whatever the source's selection says."""
    match source:
        case PythonDocs():
            name = f"{'instructions' if role in ('labels', 'seq2seq') else role}.{source.split}.jsonl"
            for line in _extracted(python_docs_digest(), name, _docs_files, store).splitlines():
                row = json.loads(line)
                yield Row(row.pop("id"), of_documentation(row, role))
        case PythonSummaries():
            name = f"summaries.{source.split}.jsonl"
            for line in _extracted(summaries_digest(), name, _summaries_files, store).splitlines():
                row = json.loads(line)
                name = row.pop("id")
                yield _row(name, row, f"{source.source}: {name}", role, {}, base_dir)
        case Datasets():
            rows = open_datasets(source, base_dir)
            rows = with_encoded_pictures(rows) if role == "pictured" else rows
            for number, row in enumerate(rows, start=1):
                place = f"{source.path}: row {number}"
                yield _row(f"{source.path}:{number}", row, place, role, source.columns, base_dir / source.path)
        case _:
            for path in find_files(source.files, base_dir):
                for name, row in read_file(source, path):
                    _, _, in_file = name.rpartition(":")
                    place = str(path) if in_file == name else f"{path}: row {in_file}"
                    yield _row(name, row, place, role, source.columns, path.parent)


def of_documentation(row: dict[str, Any], role: RowRole) -> dict[str, Any]:
    """Bring a row of the documentation into its role's form."""
    match role:
        case "labels":
            return _described_kind(row)
        case "seq2seq":
            return canonical(row, role, {})
        case _:
            return row


def _described_kind(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a question about the documentation into its answer, labelled with the kind of thing that it describes."""
    question, answer = (message["content"] for message in row["messages"])
    found = re.match(r"What is the (\w+) ", question)
    return {"text": answer, "label": found[1] if found else "function"}


def _row(name: str, row: dict[str, Any], place: str, role: RowRole, columns: Mapping[Any, str], folder: Path) -> Row:
    """Bring a row into its form; the pictures that it names are opened, relative paths from its file's folder."""
    try:
        found = canonical(row, role, columns)
    except BadRow as error:
        raise RequestError(f"{place}: {error}") from None
    if role == "pictured":
        found["images"] = open_pictures(found["images"], folder, place)
    return Row(name, found)


@lru_cache(maxsize=1)
def _docs_files(digest: str) -> dict[str, bytes]:
    """Extract python-docs; `digest` is that of the sources as they stand."""
    sets = build_sets(read_entries())
    return sets.files() | {"counts.json": json.dumps(sets.counts, sort_keys=True).encode()}


@lru_cache(maxsize=1)
def _summaries_files(digest: str) -> dict[str, bytes]:
    """Extract the summaries of python-docs; `digest` is that of the sources as they stand."""
    files = build_summaries(read_entries())
    counts = {name.removesuffix(".jsonl"): content.count(b"\n") for name, content in files.items()}
    return files | {"counts.json": json.dumps(counts, sort_keys=True).encode()}


def _extracted(digest: str, name: str, extract: Callable[[str], dict[str, bytes]], store: Store | None) -> bytes:
    """Return one of the files that the documentation gives, from the store where it is there already."""
    if store is None:
        return extract(digest)[name]
    manifest = store.find_dataset(digest)
    if manifest is None:
        files = extract(digest)
        with tempfile.TemporaryDirectory(prefix="trainwright-python-docs-") as folder:
            for file_name, content in files.items():
                (Path(folder) / file_name).write_bytes(content)
            entries = store.objects.put_folder(Path(folder))
        store.put_dataset(DatasetManifest(digest=digest, files=entries, report=json.loads(files["counts.json"])))
        return files[name]
    return store.objects.get_bytes(manifest.files[name].sha256)


def datasets_digest(source: DatasetsPlace, base_dir: Path) -> str:
    """Return 64 hex digits that change when the rows of a `datasets` data set can change."""
    found = dataset_files(source, base_dir)
    if found is None:
        identity: list[Any] = ["hub", source.path, source.revision]
    else:
        folder, paths = found
        identity = ["folder", [path.relative_to(folder).as_posix() for path in paths], files_digest(paths)]
    return hashlib.sha256(json.dumps([*identity, source.name, source.split]).encode()).hexdigest()


def dataset_files(source: DatasetsPlace, base_dir: Path) -> tuple[Path, list[Path]] | None:
    """Return the folder of a local data set and its files, sorted; None for a data set of the hub."""
    folder = _local_folder(source, base_dir)
    if folder is None:
        return None
    return folder, sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cache-"))


def _local_folder(source: DatasetsPlace, base_dir: Path) -> Path | None:
    """Return the folder of a local data set; None for a hub id, which needs its revision."""
    folder = base_dir / source.path
    if folder.is_dir():
        return folder
    if source.revision is None:
        raise RequestError(f"data set {source.path!r} is no folder in {base_dir}; a hub id needs `revision`")
    return None


def open_datasets(source: DatasetsPlace, base_dir: Path) -> Any:
    """Return the rows of a `datasets` data set; raises RequestError where it is not there."""
    import datasets

    folder = _local_folder(source, base_dir)
    try:
        if folder is None:
            return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise RequestError(f"data set {source.path!r}: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise RequestError(f"data set {source.path!r} has no split {source.split!r}; it has {', '.join(loaded)}")
        return loaded[source.split]
    return loaded
