"""Data sets of other systems as sources of a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.convert.draft import Draft
from recipes.convert.rules import Unfit

_SOURCES = {
    ".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
    ".arrow": None,
}  # fmt: skip
_COMPRESSED = (".gz",)
FORMATS = {"json": "jsonl", "jsonl": "jsonl", "csv": "csv", "parquet": "parquet", "text": "text"}
"""Names of formats in `datasets`."""


def hub_source(
    path: str, *, name: str | None = None, split: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """A data set of the hub."""
    source: dict[str, Any] = {"source": "datasets", "path": path, "revision": revision or "main"}
    if name is not None:
        source["name"] = name
    if split not in (None, "train"):
        source["split"] = split
    return source


def file_source(draft: Draft, files: Sequence[str], format_name: str | None = None) -> dict[str, Any]:
    """Local files; raises Unfit for formats that are not read."""
    kinds = {FORMATS.get(format_name or "") or _format_of(file) for file in files}
    if len(kinds) > 1:
        raise Unfit("has files of several formats; a recipe's source reads one")
    return {"source": kinds.pop(), "files": [draft.path(file) for file in files]}


def _format_of(file: str) -> str:
    suffixes = [suffix for suffix in Path(file).suffixes if suffix not in _COMPRESSED]
    found = _SOURCES.get(suffixes[-1] if suffixes else "")
    if found is None:
        raise Unfit("is no file that a recipe reads: JSON lines, CSV, Parquet or text")
    return found


def is_local(draft: Draft, path: str) -> bool:
    """Whether a data set's path is a file or folder here, or can be nothing else."""
    known = path.startswith((".", "/", "~")) or Path(path).suffix in _SOURCES
    return known or (draft.working_dir / path).exists()


def find_source(
    draft: Draft, path: str, *, files: Any = None, format_name: str | None = None, **hub: str | None
) -> dict[str, Any]:
    """The source of a data set that is a hub id, a local file, or a format with `data_files`; raises Unfit."""
    listed = [files] if isinstance(files, str) else files
    if listed is not None and not (isinstance(listed, list) and all(isinstance(file, str) for file in listed)):
        raise Unfit("data_files must be a path or a list of paths")
    if path in FORMATS and listed:
        return file_source(draft, listed, path)
    if listed and (is_local(draft, path) or all(is_local(draft, file) for file in listed)):
        inside = [file if is_local(draft, file) else f"{path}/{file}" for file in listed]
        return file_source(draft, inside, format_name)
    if listed:
        raise Unfit("data_files of a hub data set: download them and name the local files")
    if is_local(draft, path):
        if (draft.working_dir / path).is_dir():
            split = hub.get("split")
            return {
                "source": "datasets",
                "path": draft.path(path),
                **({} if split in (None, "train") else {"split": split}),
            }
        return file_source(draft, [path], format_name)
    return hub_source(path, **hub)


def merge_sources(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One source with the files of several, or a mixture where they differ in anything else."""
    merged = _merged(sources)
    return {"mix": [dict(source) for source in sources]} if merged is None else merged


def parts_of(source: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of a mixture; one source has itself alone."""
    parts: list[dict[str, Any]] = source.get("mix", [source])
    return parts


def _merged(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    first = dict(sources[0])
    rest = {key: value for key, value in first.items() if key not in ("files", "limit")}
    if any({k: v for k, v in source.items() if k not in ("files", "limit")} != rest for source in sources):
        return first if all(dict(source) == first for source in sources) else None
    if "files" not in first:
        return first if len(sources) == 1 else None
    merged = {**rest, "files": [file for source in sources for file in source["files"]]}
    limits = [source.get("limit") for source in sources]
    if None in limits:
        return merged if not any(limits) else None
    return {**merged, "limit": sum(limits)}  # type: ignore[arg-type]
