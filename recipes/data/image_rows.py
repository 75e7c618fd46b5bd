"""Rows of text with pictures: where a row names its pictures, and what is wrong with the first rows of local files."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.data.files import HEADER_FILES, HEADER_ROWS, csv_dialect, match_files
from recipes.data.image_files import MAX_LINE_BYTES, open_file
from recipes.data.text import Csv, Datasets, JsonLines, Parquet, Source
from recipes.errors import Finding, Problem, RequestError
from recipes.loading.document import LoadedRecipe
from recipes.problem_codes import Code
from recipes.rules.models import ModelFacts, model_facts
from recipes.stages.finetune import Finetune

PART_KEYS = ("image", "path", "url", "bytes")
"""Keys under which a part {type: image} of a message may hold its picture."""
DATA_URL = "data:image/"


def find_pictures(row: Mapping[str, Any], columns: Mapping[Any, str]) -> list[Any] | None:
    """The pictures that a row names, in order, by column `images` or `image` or in the parts of its messages.

    Each is a path, a data URL, encoded bytes, or {bytes, path} as `datasets` writes them. None: the row says nothing
    of pictures; an empty list or null says that it has none.
    """
    for name in ("images", "image"):
        own = columns.get(name, name)
        if own in row:
            value = row[own]
            if value is None or (isinstance(value, str) and not value):
                return []
            return list(value) if isinstance(value, list | tuple) else [value]
    found = [picture for part in _picture_parts(row, columns) if (picture := part_picture(part)) is not None]
    return found or None


def part_picture(part: Mapping[str, Any]) -> Any | None:
    """The picture that a part {type: image} of a message holds; None where it only marks the place of one."""
    return next((part[key] for key in PART_KEYS if part.get(key) is not None), None)


def _picture_parts(row: Mapping[str, Any], columns: Mapping[Any, str]) -> Iterator[Mapping[str, Any]]:
    for name in ("messages", "prompt", "completion"):
        turns = row.get(columns.get(name, name))
        for turn in turns if isinstance(turns, list) else ():
            content = turn.get("content") if isinstance(turn, Mapping) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Mapping) and part.get("type") == "image":
                    yield part


def check_pictures(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Rows of fine-tuning stages whose pictures do not suit the model, or cannot be opened."""
    for name, stage in loaded.recipe.stages.items():
        if not isinstance(stage, Finetune):
            continue
        facts = model_facts(loaded, stage)
        if facts.family not in ("vision_language", "decoder", "rnn"):
            continue
        for use in stage.sources():
            if not use.held_out and not (use.field_path == "evaluation" and stage.evaluation is None):
                place = f"stages.{name}.{use.field_path}"
                check = _check_source if facts.family == "vision_language" else _refuse_pictures
                try:
                    yield from check(loaded, place, use.rows, facts)
                except RequestError as error:
                    yield loaded.problem(Code.UNREADABLE_DATA, place, use.rows.source, str(error))
        yield from _check_room(loaded, f"stages.{name}", stage, facts)


def _check_room(loaded: LoadedRecipe, place: str, stage: Finetune, facts: ModelFacts) -> Iterator[Problem]:
    tokens = None if facts.vision is None else facts.vision.tokens_per_picture
    length = stage.train.sequence_length
    if tokens is not None and length < tokens + 2:
        message = f"one image takes {tokens} tokens of this model, which leaves no room for an answer"
        yield loaded.problem(
            Code.SEQUENCE_TOO_SHORT, f"{place}.train.sequence_length", length, message, f"above {tokens + 1}"
        )


def _refuse_pictures(loaded: LoadedRecipe, place: str, source: Source, facts: ModelFacts) -> Iterator[Problem]:
    for where, row, _ in _first_rows(source, loaded.base_dir, only_pictures=True):
        if find_pictures(row, getattr(source, "columns", {})):
            message = f"{where}: the row has an image, but the model ({facts.family}) has no vision tower"
            advice = "start from a vision-language model (llava), or take the column out of the file"
            yield loaded.problem(Code.UNEXPECTED_IMAGES, place, source.source, message, advice)
            return


def _check_source(loaded: LoadedRecipe, place: str, source: Source, facts: ModelFacts) -> Iterator[Problem]:
    if not isinstance(source, JsonLines | Csv | Parquet | Datasets):
        message = "the model is a vision-language model, and rows of this source have no images"
        yield loaded.problem(
            Code.UNSUITABLE_SOURCE, f"{place}.source", source.source, message, "use jsonl, csv, parquet or datasets"
        )
        return
    some = False
    for where, row, folder in _first_rows(source, loaded.base_dir):
        pictures = find_pictures(row, source.columns)
        finding = None
        mapped = {source.columns[name] for name in ("images", "image") if name in source.columns}
        if pictures is None and mapped <= row.keys():
            there = ", ".join(map(repr, list(row)[:8]))
            finding = Finding(
                Code.MISSING_COLUMN,
                f"{where}: no column 'images' or 'image'; the row has {there}",
                "map it with `columns`; a row without an image has `images: []`",
            )
        for picture in pictures or ():
            some = True
            trouble = unusable(picture, folder)
            if trouble is not None:
                finding = finding or Finding(Code.UNREADABLE_IMAGE, f"{where}: {trouble}")
        if finding is not None:
            yield loaded.problem_from(finding, place, source.source)
            return
    if not some and any(True for _ in _first_rows(source, loaded.base_dir)):
        message = f"none of the first {HEADER_ROWS} rows has an image, and the model is a vision-language model"
        yield loaded.problem(
            Code.MISSING_IMAGES, place, source.source, message, "fine-tune a language model on text alone"
        )


def unusable(picture: Any, folder: Path) -> str | None:
    """What is wrong with a picture as a row names it, as far as its header tells; paths start at the row's file."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, str) and picture.startswith(DATA_URL):
        return None
    opened: Path | io.BytesIO
    if isinstance(picture, str):
        if "://" in picture:
            return f"picture {picture!r} is a URL; nothing is downloaded, give a path"
        opened = folder / picture
        if not opened.is_file():
            return f"picture {picture!r} {'is no file' if opened.exists() else 'does not exist'} (looked in {folder})"
        name = str(opened)
    elif isinstance(picture, bytes):
        opened, name = io.BytesIO(picture), "the picture's bytes"
    else:
        return f"a picture is a path, bytes or {{bytes, path}}, not {type(picture).__name__}"
    try:
        with Image.open(opened) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        reason = "no picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        return f"{name} is not readable as a picture: {reason}"
    return None


def _first_rows(
    source: Source, base_dir: Path, *, only_pictures: bool = False
) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Place, row, and folder of the first rows of each file.

    What the check of files refuses is passed over; it reads no more of a Parquet file than the footer, so that rows
    below a good one raise RequestError.
    """
    if not isinstance(source, JsonLines | Csv | Parquet):
        return
    for pattern in source.files:
        try:
            files = match_files(pattern, base_dir)[:HEADER_FILES]
        except (OSError, ValueError, NotImplementedError):
            continue
        for file in files:
            try:
                for where, row in _file_rows(source, file, only_pictures):
                    yield where, row, file.parent
            except (OSError, EOFError, ValueError, csv.Error, RecursionError):
                continue


def _file_rows(
    source: JsonLines | Csv | Parquet, file: Path, only_pictures: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(source, Parquet):
        yield from _parquet_rows(source, file, only_pictures)
        return
    with open_file(file) as stream:
        lines = [line for _ in range(HEADER_ROWS + 1) if (line := stream.readline(MAX_LINE_BYTES))]
    if isinstance(source, Csv):
        reader = csv.DictReader(
            (line.decode("utf-8-sig") for line in lines), source.header, **csv_dialect(source, file)
        )
        for cells in reader:
            yield f"{file}:{reader.line_num}", {key: value for key, value in cells.items() if isinstance(key, str)}
        return
    for number, line in enumerate(lines[:HEADER_ROWS], start=1):
        row = json.loads(line) if line.strip() else None
        if isinstance(row, dict):
            yield f"{file}:{number}", row


def _parquet_rows(source: Parquet, file: Path, only_pictures: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException:
        return
    with opened:
        names = None
        if only_pictures:
            own = {source.columns.get("images", "images"), source.columns.get("image", "image")}
            names = sorted(own & set(opened.schema_arrow.names))
        if names == [] or opened.metadata.num_rows == 0:
            return
        try:
            rows = next(opened.iter_batches(batch_size=HEADER_ROWS, columns=names)).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise RequestError(f"{file}: the first rows cannot be read ({str(error)[:100]})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{file}: row {number}", row
