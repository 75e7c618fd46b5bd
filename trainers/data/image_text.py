"""Rows of text with pictures to sequences: a place for each picture, as many tokens as its features, and its pixels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from recipes.errors import RequestError
from trainers.data.encoding import Encoded, encode_instructions
from trainers.data.image_processor import PictureProcessor
from trainers.data.layouts import Count, FormSettings, Parts, lay_out, offsets
from trainers.data.row_images import RowPicture
from trainers.data.rows import Row
from trainers.data.tokenizer import Tokenization

IMAGE = {"type": "image"}


def encode_pictured(
    rows: Iterable[Row], tokenization: Tokenization, processor: PictureProcessor
) -> Iterator[tuple[Row, Encoded]]:
    """Tokenize rows whose pictures have their tokens in the text; image tokens are never part of a response."""
    takes_parts = template_takes_parts(tokenization, processor.image_token)
    placed = (place_pictures(row, processor.image_token, takes_parts=takes_parts) for row in rows)
    for row, item in encode_instructions(placed, tokenization):
        yield row, expand(row.id, item, len(row.columns["images"]), processor)


def template_takes_parts(tokenization: Tokenization, image_token: str) -> bool:
    """Tell whether the chat template writes a message's parts; others take text alone, with the token in it."""
    parts = [IMAGE, {"type": "text", "text": "probe"}]
    try:
        written = tokenization.render([{"role": "user", "content": parts}], add_generation_prompt=True)
    except RequestError:
        return False
    return image_token in written and "probe" in written and "'type'" not in written


def place_pictures(row: Row, image_token: str, *, takes_parts: bool) -> Row:
    """Give every picture its place in the text: where the row marks it, else all before the first user's words.

    Raises RequestError where places and pictures do not agree.
    """
    columns = dict(row.columns)
    try:
        return Row(row.id, placed_columns(columns, len(columns["images"]), image_token, takes_parts=takes_parts))
    except RequestError as error:
        raise RequestError(f"{row.id}: {error}") from None


def placed_columns(columns: Mapping[str, Any], pictures: int, image_token: str, *, takes_parts: bool) -> dict[str, Any]:
    """Place the pictures of a row's columns, or of {prompt} alone."""
    found = dict(columns)
    if isinstance(found.get("prompt"), str):
        texts = [found["prompt"], found.get("completion", "")]
        places = sum(text.count(image_token) for text in texts)
        if places == 0:
            found["prompt"] = f"{image_token}\n" * pictures + found["prompt"]
        _demand_places(places or pictures, pictures)
        return found
    names = [name for name in ("messages", "prompt", "completion") if name in found]
    turns = [turn for name in names for turn in found[name]]
    places = sum(_places(turn["content"], image_token) for turn in turns)
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if places == 0 and pictures:
        if first is None:
            raise RequestError("no user's turn that the picture could stand in")
        places = pictures
    else:
        first = None
    _demand_places(places, pictures)
    for name in names:
        found[name] = [
            {**turn, "content": [*([IMAGE] * pictures if turn is first else []), *turn["content"]]}
            for turn in found[name]
        ]
        if not takes_parts:
            found[name] = [{**turn, "content": _joined(turn["content"], image_token)} for turn in found[name]]
    return found


def expand(row_id: str, item: Encoded, pictures: int, processor: PictureProcessor) -> Encoded:
    """Repeat each picture's token as often as the model has features for it."""
    is_place = item.ids == processor.image_id
    if int(is_place.sum()) != pictures:
        raise RequestError(
            f"{row_id}: the chat template writes {int(is_place.sum())} places ({processor.image_token}) for "
            f"{pictures} pictures"
        )
    counts = np.where(is_place, processor.tokens_per_picture, 1)
    return Encoded(np.repeat(item.ids, counts), np.repeat(item.response & ~is_place, counts))


def encode_question(
    prompt: str | Sequence[Mapping[str, Any]], pictures: int, tokenization: Tokenization, processor: PictureProcessor
) -> list[int]:
    """Tokenize what an answer follows, text or messages, with so many pictures, as rows of training are tokenized."""
    takes_parts = template_takes_parts(tokenization, processor.image_token)
    turns = prompt
    if not isinstance(prompt, str):
        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in prompt
        ]
    placed = placed_columns({"prompt": turns}, pictures, processor.image_token, takes_parts=takes_parts)
    ids = np.asarray(tokenization.encode_prompt(placed["prompt"]), dtype=np.int32)
    found = expand("the prompt", Encoded(ids, np.zeros(len(ids), dtype=bool)), pictures, processor)
    return [int(token) for token in found.ids]


def pictured(
    encoded: Iterable[tuple[Row, Encoded]], count: Count, settings: FormSettings, processor: PictureProcessor
) -> tuple[Parts, list[RowPicture]]:
    """Pack rows with the numbers of their pictures; returns the pictures too, each once, in the order of the numbers.

    A row that is too long loses its end, and is left out where that would cut a picture.
    """
    length = settings.sequence_length
    pieces: list[Encoded] = []
    row_ids: list[str] = []
    row_pictures: list[list[int]] = []
    numbers: dict[str, int] = {}
    found: list[RowPicture] = []
    for row, item in encoded:
        if len(item) > length:
            if (item.ids[length:] == processor.image_id).any():
                count.drop("too_long", row)
                continue
            count.truncated += 1
            count.note("truncated", row)
            item = Encoded(item.ids[:length], item.response[:length])
        if settings.loss_on_all:
            item = Encoded(item.ids, item.ids != processor.image_id)
        if not item.response[1:].any():
            count.drop("no_response", row)
            continue
        count.kept += 1
        pieces.append(item)
        row_ids.append(row.id)
        row_pictures.append([])
        for picture in row.columns["images"]:
            if picture.digest not in numbers:
                numbers[picture.digest] = len(found)
                found.append(picture)
            row_pictures[-1].append(numbers[picture.digest])
    parts = lay_out(pieces, list(range(len(pieces))), row_ids, settings)
    rows, row_offsets = parts.arrays["rows"], parts.arrays["row_offsets"]
    by_sequence = [
        [number for row in rows[start:end] for number in row_pictures[row]] for start, end in pairwise(row_offsets)
    ]
    parts.arrays |= {
        "picture_numbers": np.asarray([number for numbers in by_sequence for number in numbers], dtype=np.int64),
        "picture_offsets": offsets([len(numbers) for numbers in by_sequence]),
        "pixel_factor": np.asarray([processor.factor], dtype=np.float64),
        "pixel_mean": processor.mean_C,
        "pixel_std": processor.std_C,
    }
    return parts, found


def pixel_chunks(pictures: Sequence[RowPicture], processor: PictureProcessor) -> Iterator[bytes]:
    """Yield the pixels of one picture after the other."""
    for picture in pictures:
        yield np.ascontiguousarray(processor.pixels(picture.read(), picture.name)).tobytes()


def _places(content: list[dict[str, Any]], image_token: str) -> int:
    return sum(1 if part["type"] == "image" else part["text"].count(image_token) for part in content)


def _demand_places(places: int, pictures: int) -> None:
    if places != pictures:
        raise RequestError(f"the text has {places} places for a picture, the row {pictures} pictures")


def _joined(content: list[dict[str, Any]], image_token: str) -> str:
    return "".join(f"{image_token}\n" if part["type"] == "image" else part["text"] for part in content)
