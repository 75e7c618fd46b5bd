"""Messages about images: their contents as lists of parts, text and places of images."""

from collections.abc import Mapping
from typing import Any

from trainers.data.bad_row import BadRow
from trainers.data.messages import Messages, read_messages


def read_parts(value: Any, name: str) -> Messages:
    """Read messages whose contents become lists of parts; an image leaves only its place. Raises BadRow."""
    turns = value if isinstance(value, list) else []
    parts = [_parts(turn.get("content"), f"{name}[{index}]") for index, turn in enumerate(turns) if _is_listed(turn)]
    listed = iter(parts)
    plain = [{**turn, "content": "x"} if _is_listed(turn) else turn for turn in turns]
    messages = read_messages(plain if isinstance(value, list) else value, name)
    return [
        {**message, "content": next(listed) if _is_listed(turn) else [{"type": "text", "text": message["content"]}]}
        for message, turn in zip(messages, turns, strict=True)
    ]


def _is_listed(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("content"), list)


def _parts(content: list[Any], place: str) -> list[dict[str, str]]:
    if not content:
        raise BadRow(f"{place} has no content")
    parts: list[dict[str, str]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type") == "image":
            parts.append({"type": "image"})
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadRow(f"{place} has a part that is neither text nor an image")
    return parts
