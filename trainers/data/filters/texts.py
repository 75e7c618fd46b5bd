"""The texts of a row that filters look at, and their words (pure)."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.data.filters import Part

WORD = re.compile(r"\w+")
_ANSWERS = ("completion", "chosen", "rejected", "text")


def texts_of(columns: Mapping[str, Any], part: Part) -> Iterator[str]:
    """Yield a row's texts: of its prompt, of its answers, or all of them; descriptions of tools are none."""
    for name, value in columns.items():
        if name in ("prompt", "system"):
            is_answer = False
        elif name in _ANSWERS:
            is_answer = name != "text" or "prompt" not in columns
        elif name == "messages":
            for turn in value:
                if part == "row" or (turn.get("role") == "assistant") == (part == "answer"):
                    yield from _strings(turn.get("content"))
            continue
        else:
            continue
        if part == "row" or is_answer == (part == "answer"):
            yield from _strings(value)


def text_of(columns: Mapping[str, Any], part: Part) -> str:
    """Return a row's texts, one below the other."""
    return "\n".join(texts_of(columns, part))


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def runs(words: list[str], length: int) -> list[str]:
    """Return the runs of so many words; of a shorter text the whole."""
    if len(words) <= length:
        return [" ".join(words)] if words else []
    return [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]


def _strings(value: Any) -> Iterator[str]:
    """Yield plain text, contents of messages, or texts among the parts of a content."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        yield from _strings(value.get("content", value.get("text")))
