"""Folders downloaded from the hub: which files a split has, by the hub's conventions; read by the readers of files."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from recipes.problem_codes import Code
from trainers.data.sources.csv_files import read_csv
from trainers.data.sources.json_lines import read_json_lines
from trainers.data.sources.local_files import match_files, naming_file
from trainers.data.sources.parquet import read_parquet
from trainers.data.sources.reader import RawRow, SourceError

PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (".parquet", *(f"{kind}{packing}" for kind in (".jsonl", ".json", ".csv", ".tsv") for packing in PACKED))
"""Of files with rows."""


def split_files(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Return the files of each split of a configuration; raises SourceError for a configuration that is not there.

    Which they are says the README (`configs`), else the names of files and folders, as the `datasets` library finds it.
    """
    configs = _configs(folder)
    if configs:
        named = {str(config.get("config_name", "default")): config for config in configs}
        chosen = name or next((key for key, config in named.items() if config.get("default")), next(iter(named)))
        if chosen not in named:
            there = ", ".join(named)
            raise SourceError(
                Code.UNKNOWN_SPLIT, f"the README has no configuration {chosen}", f"there: {there}", "name"
            )
        root = folder / str(named[chosen].get("data_dir", ""))
        patterns = _patterns(named[chosen].get("data_files"))
    else:
        root, patterns = folder, None
    if patterns is None:
        patterns = _conventional(root)
    found = {split: [path for text in texts for path in match_files(text, root)] for split, texts in patterns.items()}
    rows = {split: [path for path in paths if path.name.endswith(SUFFIXES)] for split, paths in found.items()}
    return {split: sorted(set(paths)) for split, paths in rows.items() if paths}


def has_rows(folder: Path) -> bool:
    """Tell whether a folder holds files of rows."""
    return any(path.name.endswith(SUFFIXES) for path in match_files("**/*", folder))


def read_files(paths: list[Path], limit: int | None) -> Iterator[RawRow]:
    """Yield the rows of files, or the first of them; raises SourceError naming the file."""
    left = limit
    for path in paths:
        with naming_file(path):
            for row in islice(_rows(path, left), left):
                left = None if left is None else left - 1
                yield row


def _rows(path: Path, limit: int | None) -> Iterator[RawRow]:
    if path.suffix == ".parquet":
        return read_parquet(path, limit)
    return read_json_lines(path) if ".json" in path.name else read_csv(path)


def _configs(folder: Path) -> list[Mapping[str, Any]]:
    """Read the configurations of the README's head."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    with naming_file(readme):
        text = readme.read_text(encoding="utf-8-sig", errors="replace")
    head = text.split("---\n", 2)[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(Code.INVALID_DATA_FORMAT, f"{readme}: its head is not YAML: {reason}", field="path") from None
    configs = found.get("configs") if isinstance(found, Mapping) else None
    return [config for config in configs if isinstance(config, Mapping)] if isinstance(configs, list) else []


def _patterns(files: Any) -> dict[str, list[str]] | None:
    """Bring `data_files` into patterns by split: a pattern, a list of them, a mapping, or a list of {split, path}."""
    if files is None:
        return None
    if isinstance(files, str):
        return {"train": [files]}
    if isinstance(files, Mapping):
        return {str(split): _listed(paths) for split, paths in files.items()}
    if all(isinstance(item, Mapping) for item in files):
        found: dict[str, list[str]] = {}
        for item in files:
            found.setdefault(str(item.get("split", "train")), []).extend(_listed(item.get("path")))
        return found
    return {"train": _listed(files)}


def _listed(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths]) if path]


def _conventional(root: Path) -> dict[str, list[str]]:
    from datasets.data_files import get_data_patterns

    try:
        return {str(split): list(texts) for split, texts in get_data_patterns(str(root)).items()}
    except (OSError, ValueError) as error:
        raise SourceError(Code.MISSING_FILE, f"{root} holds no files of rows: {error}", field="path") from None
