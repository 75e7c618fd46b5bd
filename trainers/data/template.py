"""Where responses stand in the text that a chat template makes of a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.errors import RequestError
from recipes.tokenizers.chat_template import CLOSE, OPEN, Message, render

Span = tuple[int, int]
Tools = Sequence[Mapping[str, Any]] | None
"""Descriptions of the tools that a conversation may use."""


def response_spans(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    special_tokens: Sequence[str] = (),
    tools: Tools = None,
) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the character spans that the assistant wrote, end token included.

    Blanks that the template writes after a turn's special token (ChatML's line break) are nobody's: they are in no
    span, and a conversation that the assistant ends is cut there.

    With `{% generation %}` in the template these are its blocks. Otherwise a span runs from the end of the rendering
    up to a turn (with generation prompt) to the end of the rendering with it; a turn whose two renderings are
    no beginnings of the whole (templates that rewrite earlier turns) has no span, nor has one of weight 0.
    """
    if "generation" in template and "endgeneration" in template:
        whole, spans = _unmark(render(template, messages, tokens, tools, mark=True))
        spans = _learnt(spans, messages)
    else:
        whole, spans = _differences(template, messages, tokens, tools)
    ends_whole = bool(spans) and spans[-1][1] == len(whole)
    spans = [(start, turn_end(whole, start, end, special_tokens)) for start, end in spans]
    return whole[: spans[-1][1]] if ends_whole else whole, spans


def turn_end(text: str, start: int, end: int, special_tokens: Sequence[str]) -> int:
    """Return where a turn that stands at [start, end) ends: after its special token, before blanks that follow it."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(tuple(special_tokens)) else end


def is_unlearnt(message: Message) -> bool:
    """Tell whether a turn is no target: its weight is 0."""
    return message.get("weight") == 0


def _learnt(spans: list[Span], messages: Sequence[Message]) -> list[Span]:
    """Leave out the blocks of turns that are not learnt; raises RequestError where blocks and turns do not agree."""
    turns = [message for message in messages if message.get("role") == "assistant"]
    if not any(map(is_unlearnt, turns)):
        return spans
    if len(turns) != len(spans):
        raise RequestError(
            f"a turn has weight 0, and the chat template marks {len(spans)} blocks of generation for {len(turns)} turns"
        )
    return [span for span, turn in zip(spans, turns, strict=True) if not is_unlearnt(turn)]


def _differences(
    template: str, messages: Sequence[Message], tokens: Mapping[str, str], tools: Tools
) -> tuple[str, list[Span]]:
    whole = render(template, messages, tokens, tools)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" or is_unlearnt(message):
            continue
        before = render(template, messages[:index], tokens, tools, add_generation_prompt=True) if index else ""
        after = whole if index == len(messages) - 1 else render(template, messages[: index + 1], tokens, tools)
        if whole.startswith(before) and whole.startswith(after) and len(before) < len(after):
            spans.append((len(before), len(after)))
    return whole, spans


def _unmark(marked: str) -> tuple[str, list[Span]]:
    text = ""
    spans: list[Span] = []
    for number, piece in enumerate(marked.split(OPEN)):
        if number == 0:
            text = piece
            continue
        inside, _, outside = piece.partition(CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans
