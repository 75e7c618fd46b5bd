"""Rows of text with images to sequences: a place for each image, as many tokens as its features, and its pixels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from recipes.errors import RequestError
from trainers.data.encoding import Encoded, encode_instructions
from trainers.data.image_processor import ImageProcessor
from trainers.data.layouts import Count, FormSettings, Parts, lay_out, offsets
from trainers.data.row_images import RowImage
from trainers.data.rows import Row
from trainers.data.tokenizer import Tokenization

IMAGE = {"type": "image"}


def encode_image_text(
    rows: Iterable[Row], tokenization: Tokenization, processor: ImageProcessor
) -> Iterator[tuple[Row, Encoded]]:
    """Tokenize rows whose images have their tokens in the text; image tokens are never part of a response."""
    takes_parts = template_takes_parts(tokenization, processor.image_token)
    placed = (place_images(row, processor.image_token, takes_parts=takes_parts) for row in rows)
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


def place_images(row: Row, image_token: str, *, takes_parts: bool) -> Row:
    """Give every image its place in the text: where the row marks it, else all before the first user's words.

    Raises RequestError where places and images do not agree.
    """
    columns = dict(row.columns)
    try:
        return Row(row.id, placed_columns(columns, len(columns["images"]), image_token, takes_parts=takes_parts))
    except RequestError as error:
        raise RequestError(f"{row.id}: {error}") from None


def placed_columns(columns: Mapping[str, Any], images: int, image_token: str, *, takes_parts: bool) -> dict[str, Any]:
    """Place the images of a row's columns, or of {prompt} alone."""
    found = dict(columns)
    if isinstance(found.get("prompt"), str):
        texts = [found["prompt"], found.get("completion", "")]
        places = sum(text.count(image_token) for text in texts)
        if places == 0:
            found["prompt"] = f"{image_token}\n" * images + found["prompt"]
        _demand_places(places or images, images)
        return found
    names = [name for name in ("messages", "prompt", "completion") if name in found]
    turns = [turn for name in names for turn in found[name]]
    places = sum(_places(turn["content"], image_token) for turn in turns)
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if places == 0 and images:
        if first is None:
            raise RequestError("no user's turn that the image could stand in")
        places = images
    else:
        first = None
    _demand_places(places, images)
    for name in names:
        found[name] = [
            {**turn, "content": [*([IMAGE] * images if turn is first else []), *turn["content"]]}
            for turn in found[name]
        ]
        if not takes_parts:
            found[name] = [{**turn, "content": _joined(turn["content"], image_token)} for turn in found[name]]
    return found


def expand(row_id: str, item: Encoded, images: int, processor: ImageProcessor) -> Encoded:
    """Repeat each image's token as often as the model has features for it."""
    is_place = item.ids == processor.image_id
    if int(is_place.sum()) != images:
        raise RequestError(
            f"{row_id}: the chat template writes {int(is_place.sum())} places ({processor.image_token}) for "
            f"{images} images"
        )
    counts = np.where(is_place, processor.tokens_per_image, 1)
    return Encoded(np.repeat(item.ids, counts), np.repeat(item.response & ~is_place, counts))


def encode_question(
    prompt: str | Sequence[Mapping[str, Any]], images: int, tokenization: Tokenization, processor: ImageProcessor
) -> list[int]:
    """Tokenize what an answer follows, text or messages, with so many images, as rows of training are tokenized."""
    takes_parts = template_takes_parts(tokenization, processor.image_token)
    turns = prompt
    if not isinstance(prompt, str):
        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in prompt
        ]
    placed = placed_columns({"prompt": turns}, images, processor.image_token, takes_parts=takes_parts)
    ids = np.asarray(tokenization.encode_prompt(placed["prompt"]), dtype=np.int32)
    found = expand("the prompt", Encoded(ids, np.zeros(len(ids), dtype=bool)), images, processor)
    return [int(token) for token in found.ids]


def image_text_arrays(
    encoded: Iterable[tuple[Row, Encoded]], count: Count, settings: FormSettings, processor: ImageProcessor
) -> tuple[Parts, list[RowImage]]:
    """Pack rows with the numbers of their images; returns the images too, each once, in the order of the numbers.

    A row that is too long loses its end, and is left out where that would cut an image.
    """
    length = settings.sequence_length
    pieces: list[Encoded] = []
    row_ids: list[str] = []
    images_by_row: list[list[int]] = []
    numbers: dict[str, int] = {}
    found: list[RowImage] = []
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
        images_by_row.append([])
        for image in row.columns["images"]:
            if image.digest not in numbers:
                numbers[image.digest] = len(found)
                found.append(image)
            images_by_row[-1].append(numbers[image.digest])
    parts = lay_out(pieces, list(range(len(pieces))), row_ids, settings)
    rows, row_offsets = parts.arrays["rows"], parts.arrays["row_offsets"]
    by_sequence = [
        [number for row in rows[start:end] for number in images_by_row[row]] for start, end in pairwise(row_offsets)
    ]
    parts.arrays |= {
        "image_numbers": np.asarray([number for numbers in by_sequence for number in numbers], dtype=np.int64),
        "image_offsets": offsets([len(numbers) for numbers in by_sequence]),
        "pixel_factor": np.asarray([processor.factor], dtype=np.float64),
        "pixel_mean": processor.mean_C,
        "pixel_std": processor.std_C,
    }
    return parts, found


def pixel_chunks(images: Sequence[RowImage], processor: ImageProcessor) -> Iterator[bytes]:
    """Yield the pixels of one image after the other."""
    for image in images:
        yield np.ascontiguousarray(processor.pixels(image.read(), image.name)).tobytes()


def _places(content: list[dict[str, Any]], image_token: str) -> int:
    return sum(1 if part["type"] == "image" else part["text"].count(image_token) for part in content)


def _demand_places(places: int, images: int) -> None:
    if places != images:
        raise RequestError(f"the text has {places} places for an image, the row {images} images")


def _joined(content: list[dict[str, Any]], image_token: str) -> str:
    return "".join(f"{image_token}\n" if part["type"] == "image" else part["text"] for part in content)
