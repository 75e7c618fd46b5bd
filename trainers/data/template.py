"""Chat templates: Jinja in transformers' convention, in a sandbox, and where responses stand in the text."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from recipes.errors import RequestError
from recipes.template_sandbox import TEMPLATE_ERRORS, TemplateSandbox

Message = Mapping[str, Any]
Span = tuple[int, int]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` notes which characters an assistant wrote (transformers' convention)."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = str(caller())
        return f"{_OPEN}{text}{_CLOSE}" if self.environment.globals.get("_mark") else text


_OPEN, _CLOSE = "\ue000\ue001", "\ue001\ue000"
"""Private-use characters that mark generation blocks while spans are sought."""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=32)
def _compile(template: str, mark: bool) -> jinja2.Template:
    environment = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["_mark"] = mark
    try:
        return environment.from_string(template)
    except TEMPLATE_ERRORS as error:
        raise RequestError(f"chat template: {error or type(error).__name__}") from None


def render(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    mark: bool = False,
) -> str:
    """Render messages; `tokens` gives eos_token, pad_token, ... Raises RequestError with the template's own complaint.

    `strftime_now` is undefined, so that a template that would write today's date takes its default.
    """
    try:
        return _compile(template, mark).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None, **tokens
        )
    except TEMPLATE_ERRORS as error:
        raise RequestError(f"chat template: {error or type(error).__name__}") from None


def response_spans(
    template: str, messages: Sequence[Message], tokens: Mapping[str, str], special_tokens: Sequence[str] = ()
) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the character spans that the assistant wrote, end token included.

    Blanks that the template writes after a turn's special token (ChatML's line break) are nobody's: they are in no
    span, and a conversation that the assistant ends is cut there.

    With `{% generation %}` in the template these are its blocks. Otherwise a span runs from the end of the rendering
    up to a turn (with generation prompt) to the end of the rendering with it; a turn whose two renderings are
    no beginnings of the whole (templates that rewrite earlier turns) has no span.
    """
    if "generation" in template and "endgeneration" in template:
        whole, spans = _unmark(render(template, messages, tokens, mark=True))
    else:
        whole, spans = _differences(template, messages, tokens)
    ends_whole = bool(spans) and spans[-1][1] == len(whole)
    spans = [(start, turn_end(whole, start, end, special_tokens)) for start, end in spans]
    return whole[: spans[-1][1]] if ends_whole else whole, spans


def turn_end(text: str, start: int, end: int, special_tokens: Sequence[str]) -> int:
    """Return where a turn that stands at [start, end) ends: after its special token, before blanks that follow it."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(tuple(special_tokens)) else end


def _differences(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> tuple[str, list[Span]]:
    whole = render(template, messages, tokens)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = render(template, messages[:index], tokens, add_generation_prompt=True) if index else ""
        after = whole if index == len(messages) - 1 else render(template, messages[: index + 1], tokens)
        if whole.startswith(before) and whole.startswith(after) and len(before) < len(after):
            spans.append((len(before), len(after)))
    return whole, spans


def _unmark(marked: str) -> tuple[str, list[Span]]:
    text = ""
    spans: list[Span] = []
    for number, piece in enumerate(marked.split(_OPEN)):
        if number == 0:
            text = piece
            continue
        inside, _, outside = piece.partition(_CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans
