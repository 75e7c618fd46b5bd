"""Places of images in rows of text: where the row marks them, and as many tokens for each as it has features."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recipes.errors import RequestError
from trainers.data.encoding import Encoded
from trainers.data.image_processor import ImageTokens
from trainers.data.row_images import RowImage
from trainers.data.rows import Row
from trainers.data.tokenizer import Tokenization

IMAGE = {"type": "image"}


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
        placed = placed_columns(columns, len(columns["images"]), image_token, takes_parts=takes_parts)
        return replace(row, columns=placed)
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


def expand(row_id: str, item: Encoded, images: Sequence[RowImage], processor: ImageTokens) -> Encoded:
    """Put the tokens of each image, as the processor writes them, in its place; none is part of a response."""
    is_place = item.ids == processor.image_id
    places = np.flatnonzero(is_place)
    if len(places) != len(images):
        raise RequestError(
            f"{row_id}: the chat template writes {len(places)} places ({processor.image_token}) for "
            f"{len(images)} images"
        )
    written = [processor.token_ids(image) for image in images]
    counts = np.ones(len(item.ids), dtype=np.int64)
    counts[places] = [len(ids) for ids in written]
    found = Encoded(np.repeat(item.ids, counts), np.repeat(item.response & ~is_place, counts))
    for end, ids in zip(np.cumsum(counts)[places], written, strict=True):
        found.ids[end - len(ids) : end] = ids
    return found


def encode_question(
    prompt: str | Sequence[Mapping[str, Any]],
    images: Sequence[RowImage],
    tokenization: Tokenization,
    processor: ImageTokens,
) -> list[int]:
    """Tokenize what an answer follows, text or messages, with its images, as rows of training are tokenized."""
    takes_parts = template_takes_parts(tokenization, processor.image_token)
    turns = prompt
    if not isinstance(prompt, str):
        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in prompt
        ]
    placed = placed_columns({"prompt": turns}, len(images), processor.image_token, takes_parts=takes_parts)
    ids = np.asarray(tokenization.encode_prompt(placed["prompt"]), dtype=np.int32)
    found = expand("the prompt", Encoded(ids, np.zeros(len(ids), dtype=bool)), images, processor)
    return [int(token) for token in found.ids]


def _places(content: list[dict[str, Any]], image_token: str) -> int:
    return sum(1 if part["type"] == "image" else part["text"].count(image_token) for part in content)


def _demand_places(places: int, images: int) -> None:
    if places != images:
        raise RequestError(f"the text has {places} places for an image, the row {images} images")


def _joined(content: list[dict[str, Any]], image_token: str) -> str:
    return "".join(f"{image_token}\n" if part["type"] == "image" else part["text"] for part in content)
