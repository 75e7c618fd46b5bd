"""Local data files as far as their first rows tell: there, readable, with the columns that the stage needs."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.data.columns import FORMS, check_columns, check_row
from recipes.data.image_files import (
    MAX_LINE_BYTES,
    METADATA,
    PICTURE_SUFFIXES,
    missing_columns,
    open_file,
    picture_columns,
    read_caption_file,
    read_idx_header,
    read_numpy,
    read_picture_lines,
)
from recipes.data.images import (
    Digits,
    Idx,
    ImageArrays,
    ImageDatasets,
    ImageFolder,
    ImageJsonLines,
    ImageParquet,
)
from recipes.data.text import Csv, Datasets, JsonLines, Parquet, PythonDocs, PythonSummaries, TextFiles
from recipes.errors import Finding, Problem
from recipes.loading.document import LoadedRecipe
from recipes.loading.schema_paths import nearest
from recipes.problem_codes import Code
from recipes.rules.models import model_facts
from recipes.stages.base import INPUT_FIELDS, SOURCE_FIELDS, Role, SourceUse
from recipes.stages.reward import Reward

_BY_FAMILY: dict[str | None, Role] = {"encoder": "labels", "encoder_decoder": "seq2seq"}
"""What the rows of a fine-tuning are for, where they are no instructions."""

MAX_FILES = 10_000
HEADER_FILES = 32
HEADER_ROWS = 20


def check_data(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Everything wrong with the local files that the stages read."""
    seen: set[tuple[str, str]] = set()
    for name, stage in loaded.stages_with(*SOURCE_FIELDS, *INPUT_FIELDS):
        uses = stage.sources()
        if isinstance(stage, Reward) and not any(use.field_path == "evaluation" for use in uses):
            message = "there are no held-out pairs, and the gate needs their accuracy"
            yield loaded.problem(
                Code.MISSING_HELD_OUT,
                f"stages.{name}.data",
                "",
                message,
                "give `evaluation`, or `hold_out: 0.05` in `data`",
            )
        for use in uses:
            place = f"stages.{name}.{use.field_path}"
            if use.field_path == "evaluation" and getattr(stage, "evaluation", None) is None:
                continue  # rows of the stage's `data`
            if use.role == "instructions":
                use = replace(use, role=_BY_FAMILY.get(model_facts(loaded, stage).family, use.role))
            for problem in _check_source(loaded, place, use):
                if (problem.field, problem.message) not in seen:
                    seen.add((problem.field, problem.message))
                    yield problem


def _check_source(loaded: LoadedRecipe, place: str, use: SourceUse) -> Iterator[Problem]:
    source = use.source
    match source:
        case PythonDocs() | Digits():
            return
        case PythonSummaries():
            if not any(set(form) <= {"prompt", "completion"} for form in FORMS[use.role]):
                needed = " or ".join("+".join(form) for form in FORMS[use.role])
                message = f"summaries have the columns prompt and completion; this needs {needed}"
                yield loaded.problem(
                    Code.UNSUITABLE_SOURCE, f"{place}.source", source.source, message, "use python-docs"
                )
        case Idx():
            yield from _check_files(loaded, place, source.files, read_idx_header)
            yield from _check_files(loaded, place, source.label_files, read_idx_header, "label_files")
            if source.label_files and len(source.label_files) != len(source.files):
                message = f"one file for each of the {len(source.files)} in files"
                yield loaded.problem(Code.FILE_COUNT_MISMATCH, f"{place}.label_files", source.label_files, message)
        case ImageFolder():
            yield from _check_picture_folder(loaded, place, source)
        case ImageArrays():
            arrays = [name for name in (source.images, source.labels) if name is not None]
            yield from _check_files(loaded, place, source.files, partial(read_numpy, wanted=arrays))
            reader = partial(read_caption_file, wanted=source.caption)
            yield from _check_files(loaded, place, source.caption_files, reader, "caption_files")
            if source.caption_files and len(source.caption_files) != len(source.files):
                message = f"one file for each of the {len(source.files)} in files"
                yield loaded.problem(Code.FILE_COUNT_MISMATCH, f"{place}.caption_files", source.caption_files, message)
        case ImageJsonLines():
            yield from _check_files(
                loaded, place, source.files, partial(read_picture_lines, wanted=picture_columns(source))
            )
        case ImageParquet():
            wanted = picture_columns(source)
            yield from _check_files(loaded, place, source.files, partial(_read_picture_parquet, wanted=wanted))
        case Datasets() | ImageDatasets():
            yield from _check_datasets(loaded, place, source)
        case TextFiles():
            if ("text",) not in FORMS[use.role]:
                needed = " or ".join("+".join(form) for form in FORMS[use.role])
                message = f"plain text has only the column text; this needs {needed}"
                yield loaded.problem(
                    Code.UNSUITABLE_SOURCE,
                    f"{place}.source",
                    source.source,
                    message,
                    "use jsonl, csv, parquet or python-docs",
                )
            yield from _check_files(loaded, place, source.files, _read_text)
            yield from _check_divisible(loaded, place, source)
        case JsonLines():
            yield from _check_files(
                loaded, place, source.files, partial(_read_jsonl, columns=source.columns, role=use.role)
            )
        case Csv():
            yield from _check_files(loaded, place, source.files, partial(_read_csv, source=source, role=use.role))
        case Parquet():
            reader = partial(_read_parquet, columns=source.columns, role=use.role)
            yield from _check_files(loaded, place, source.files, reader)


def _check_files(
    loaded: LoadedRecipe,
    place: str,
    patterns: list[str],
    read: Callable[[Path], Iterator[Finding]],
    field: str = "files",
) -> Iterator[Problem]:
    for index, pattern in enumerate(patterns):
        here = f"{place}.{field}.{index}"
        if pattern.startswith("~") or "://" in pattern or "$" in pattern:
            message = "expected a path or a glob pattern; '~', '$' and URLs are not expanded"
            yield loaded.problem(Code.INVALID_PATH, here, pattern, message)
            continue
        try:
            files = match_files(pattern, loaded.base_dir)
        except (OSError, ValueError, NotImplementedError) as error:
            yield loaded.problem(Code.INVALID_PATH, here, pattern, f"not a usable pattern ({error})")
            continue
        if not files:
            is_pattern = any(character in pattern for character in "*?[")
            message = "no file matches" if is_pattern else "there is no such file"
            folder = loaded.base_dir / Path(pattern).parent
            near = [] if is_pattern or not folder.is_dir() else sorted(os.listdir(folder))[:1000]
            guess = nearest(Path(pattern).name, near) if near else None
            suggestion = f"did you mean {Path(pattern).parent / guess}?" if guess else f"looked in {folder.resolve()}"
            yield loaded.problem(Code.MISSING_FILE, here, pattern, message, suggestion)
            continue
        for file in files[:HEADER_FILES]:
            try:
                if file.is_dir():
                    advice = f"did you mean {pattern.rstrip('/')}/*?"
                    yield loaded.problem(Code.INVALID_PATH, here, pattern, f"{file} is a folder", advice)
                elif not file.is_file():
                    yield loaded.problem(Code.INVALID_PATH, here, pattern, f"{file} is not a regular file")
                elif file.stat().st_size == 0:
                    yield loaded.problem(Code.EMPTY_FILE, here, pattern, f"{file} is empty")
                else:
                    for finding in read(file):
                        yield loaded.problem_from(finding, here, pattern)
            except (OSError, EOFError) as error:
                message = f"{file} cannot be read: {getattr(error, 'strerror', None) or error}"
                yield loaded.problem(Code.UNREADABLE_DATA, here, pattern, message)


def _check_divisible(loaded: LoadedRecipe, place: str, source: TextFiles) -> Iterator[Problem]:
    """A single document is learnt from or held out, never divided."""
    if source.documents != "file" or source.hold_out == 0:
        return
    try:
        files = {file for pattern in source.files for file in match_files(pattern, loaded.base_dir)}
    except (OSError, ValueError, NotImplementedError):
        return  # reported by _check_files
    if len(files) == 1:
        message = f"{files.pop()} is one document, which is learnt from or held out as a whole"
        yield loaded.problem(
            Code.SINGLE_DOCUMENT, f"{place}.hold_out", source.hold_out, message, "documents: paragraph, or more files"
        )


def match_files(pattern: str, base_dir: Path) -> list[Path]:
    """The files that a path or glob pattern names, sorted; relative patterns start at `base_dir`."""
    path = Path(pattern)
    if not any(character in pattern for character in "*?["):
        file = path if path.is_absolute() else base_dir / path
        return [file] if file.exists() else []
    root, relative = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (base_dir, path)
    found = []
    for file in root.glob(str(relative)):
        if file.is_file():
            found.append(file)
        if len(found) > MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files match")
    return sorted(found)


def _read_text(file: Path) -> Iterator[Finding]:
    with open_file(file) as stream:
        head = stream.read(1 << 16)
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            line = head.count(b"\n", 0, error.start) + 1
            message = f"{file}:{line} is not UTF-8 text (byte 0x{head[error.start]:02x})"
            yield Finding(Code.NOT_UTF8, message, "convert it to UTF-8")
        return
    if not text.strip():
        yield Finding(Code.EMPTY_FILE, f"{file} contains only white space")


def _read_jsonl(file: Path, columns: Mapping[Any, str], role: Role) -> Iterator[Finding]:
    rows = 0
    with open_file(file) as stream:
        for number in range(1, 10 * HEADER_ROWS):
            line = stream.readline(MAX_LINE_BYTES + 1)
            if not line or rows >= HEADER_ROWS:
                break
            if len(line) > MAX_LINE_BYTES:
                message = f"{file}:{number}: the line is longer than {MAX_LINE_BYTES} bytes"
                yield Finding(Code.INVALID_DATA_FORMAT, message, "one JSON object a line")
                return
            if not line.strip():
                continue
            rows += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                message = f"{file}:{number}: not JSON ({str(error)[:100]})"
                yield Finding(Code.INVALID_DATA_FORMAT, message, "one JSON object a line")
                return
            if not isinstance(row, dict):
                message = f"{file}:{number}: not a JSON object but {type(row).__name__}"
                yield Finding(Code.INVALID_DATA_FORMAT, message, "one JSON object a line")
                return
            finding = next(check_row(f"{file}:{number}", row, columns, role), None)
            if finding is not None:
                yield finding
                return
    if rows == 0:
        yield Finding(Code.EMPTY_FILE, f"{file} has no rows")


def csv_dialect(source: Csv | None, file: Path) -> dict[str, Any]:
    """How csv's reader reads a file of the source, or one that no source names."""
    by_name = "\t" if file.name.removesuffix(".gz").endswith(".tsv") else ","
    if source is None:
        return {"delimiter": by_name}
    quoting = csv.QUOTE_MINIMAL if source.quotes else csv.QUOTE_NONE
    return {"delimiter": source.delimiter or by_name, "quoting": quoting}


def _read_csv(file: Path, source: Csv, role: Role) -> Iterator[Finding]:
    with open_file(file) as stream:
        lines = [line for _ in range(HEADER_ROWS + 1) if (line := stream.readline(MAX_LINE_BYTES))]
    try:
        rows = list(csv.reader([line.decode("utf-8-sig") for line in lines], **csv_dialect(source, file)))
        header = source.header or rows.pop(0)
    except (UnicodeDecodeError, csv.Error, IndexError) as error:
        yield Finding(
            Code.INVALID_DATA_FORMAT, f"{file} is not readable as CSV ({error})", "UTF-8 text with a header line"
        )
        return
    if source.header is not None and rows and len(rows[0]) != len(header):
        message = f"{file}:1: {len(rows[0])} cells, but `header` names {len(header)}"
        yield Finding(Code.CELL_COUNT_MISMATCH, message, "set `delimiter` or `header`")
        return
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        yield Finding(Code.DUPLICATE_ITEM, f"{file}:1: duplicate column name {repeated[0]!r}")
    yield from check_columns(str(file), header, source.columns, role)
    if not rows:
        yield Finding(Code.EMPTY_FILE, f"{file} has a header but no rows")


def _check_picture_folder(loaded: LoadedRecipe, place: str, source: ImageFolder) -> Iterator[Problem]:
    folder = loaded.base_dir / source.path
    if not folder.is_dir():
        message = "is a file, not a folder" if folder.exists() else "there is no such folder"
        yield loaded.problem(Code.MISSING_FOLDER, f"{place}.path", source.path, message, f"looked for {folder}")
    elif not any(file.suffix.lower() in PICTURE_SUFFIXES for file in folder.rglob("*")):
        known = " ".join(PICTURE_SUFFIXES)
        yield loaded.problem(
            Code.MISSING_IMAGES,
            f"{place}.path",
            source.path,
            "the folder contains no images",
            f"files that end in {known}",
        )
    elif source.captions == "metadata" and not any((folder / name).is_file() for name in METADATA):
        message = f"the folder contains no {' or '.join(METADATA)}"
        yield loaded.problem(
            Code.MISSING_CAPTIONS, f"{place}.captions", source.captions, message, "rows with file_name and a caption"
        )
    elif source.captions == "beside":
        pictures = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        bare = next((file for file in islice(pictures, HEADER_FILES) if not file.with_suffix(".txt").is_file()), None)
        if bare is not None:
            message = f"{bare} has no caption file next to it"
            yield loaded.problem(
                Code.MISSING_CAPTIONS,
                f"{place}.captions",
                source.captions,
                message,
                f"write {bare.with_suffix('.txt').name}",
            )


def _read_picture_parquet(file: Path, wanted: list[str]) -> Iterator[Finding]:
    names: list[str] | None = None
    for found in _parquet_names(file):
        if isinstance(found, list):
            names = found
        else:
            yield found
    if names is not None:
        yield from missing_columns(str(file), wanted, names)


def _read_parquet(file: Path, columns: Mapping[Any, str], role: Role) -> Iterator[Finding]:
    for found in _parquet_names(file):
        if isinstance(found, list):
            yield from check_columns(str(file), found, columns, role)
        else:
            yield found


def _parquet_names(file: Path) -> Iterator[Finding | list[str]]:
    """Findings of a Parquet file's footer and, where it can be read, the names of its columns."""
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(max(0, file.stat().st_size - 4))
        end = stream.read(4)
    if start != b"PAR1" or end != b"PAR1":
        yield Finding(Code.INVALID_DATA_FORMAT, f"{file} is not a Parquet file, or is truncated")
        return
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (ArrowException, OSError) as error:
        yield Finding(Code.INVALID_DATA_FORMAT, f"{file}: the footer cannot be read ({str(error)[:100]})")
        return
    if metadata.num_rows == 0:
        yield Finding(Code.EMPTY_FILE, f"{file} has no rows")
    yield metadata.schema.to_arrow_schema().names


def _check_datasets(loaded: LoadedRecipe, place: str, source: Datasets | ImageDatasets) -> Iterator[Problem]:
    folder = loaded.base_dir / source.path
    looks_local = source.path.startswith((".", "/")) or folder.is_dir()
    if not looks_local:
        if source.revision is None:
            message = "a hub data set needs its `revision`, so that the same rows are read again"
            yield loaded.problem(
                Code.MISSING_REVISION,
                f"{place}.path",
                source.path,
                message,
                "give the commit hash, or a local folder as ./folder",
            )
        return
    if not folder.is_dir():
        yield loaded.problem(
            Code.MISSING_FOLDER, f"{place}.path", source.path, "there is no such folder", f"looked for {folder}"
        )
    elif not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        message = "the folder was not written by datasets' save_to_disk (no dataset_dict.json or state.json)"
        yield loaded.problem(Code.INVALID_DATA_FORMAT, f"{place}.path", source.path, message)
    elif (folder / "dataset_dict.json").is_file():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_bytes()).get("splits", [])
        except (OSError, ValueError, AttributeError) as error:
            yield loaded.problem(
                Code.INVALID_DATA_FORMAT, f"{place}.path", source.path, f"dataset_dict.json cannot be read ({error})"
            )
            return
        if source.split not in splits:
            guess = nearest(source.split, splits)
            suggestion = f"did you mean {guess}?" if guess else "splits there: " + ", ".join(splits)
            yield loaded.problem(
                Code.UNKNOWN_SPLIT, f"{place}.split", source.split, "the data set has no such split", suggestion
            )
