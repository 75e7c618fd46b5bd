"""Rows to token sequences: which tokens, and which of them are the response, by position and never by token id."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from recipes.errors import RequestError
from trainers.data.columns import RowRole
from trainers.data.conversation import as_conversation
from trainers.data.rows import Row
from trainers.data.template import Span
from trainers.data.tokenizer import Tokenization

ROWS_AT_ONCE = 2000


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized text; `response` is True at the tokens of responses."""

    ids: np.ndarray
    response: np.ndarray

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class _Marked:
    """A text with the character spans of its responses, in order; `ends` adds the end token to the last."""

    text: str
    spans: list[Span]
    special: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as it stands in the row, and rendered."""

    source: Any
    text: str


def conversation_of(row: Row) -> Row:
    """Return the row with its plain text as turns; see `as_conversation`."""
    with _naming(row):
        return Row(row.id, as_conversation(row.columns))


def encode_texts(rows: Iterable[Row], tokenization: Tokenization) -> Iterator[tuple[Row, Encoded]]:
    """Tokenize plain texts, with a label or not, with an end token; every token counts as response.

    A text without words has no tokens, also where the tokenizer puts marks around every text.
    """
    (marks,) = _encode_plain([""], tokenization)
    for chunk in _chunks(rows):
        texts = [row.columns["text"] for row in chunk]
        for row, encoded in zip(chunk, _encode_plain(texts, tokenization), strict=True):
            yield row, encoded if len(encoded) > len(marks) else Encoded(encoded.ids[:0], encoded.response[:0])


def encode_instructions(rows: Iterable[Row], tokenization: Tokenization) -> Iterator[tuple[Row, Encoded]]:
    """Tokenize conversations, prompts with completions, or plain texts."""
    for chunk in _chunks(rows):
        marked: list[_Marked] = []
        for row in chunk:
            with _naming(row):
                marked.append(_mark_instruction(row, tokenization))
        yield from zip(chunk, _encode_marked(marked, tokenization), strict=True)


def encode_sources_and_targets(
    rows: Iterable[Row], tokenization: Tokenization
) -> Iterator[tuple[Row, np.ndarray, np.ndarray]]:
    """Tokenize sources as prompts are, and their targets; both end with the end token."""
    for chunk in _chunks(rows):
        texts = []
        for row in chunk:
            with _naming(row):
                texts.append(_render_prompt(row.columns["prompt"], tokenization).text)
        sources = [encoded.ids for encoded in _encode_plain(texts, tokenization)]
        targets = [encoded.ids for encoded in _encode_plain([row.columns["completion"] for row in chunk], tokenization)]
        yield from zip(chunk, sources, targets, strict=True)


def encode_pairs(rows: Iterable[Row], tokenization: Tokenization) -> Iterator[tuple[Row, Encoded, Encoded]]:
    """Tokenize both answers of preferences, each after the prompt; everything after the prompt is the response."""
    for chunk in _chunks(rows):
        marked: list[_Marked] = []
        for row in chunk:
            with _naming(row):
                prompt = _render_prompt(row.columns["prompt"], tokenization)
                marked += [_mark_answer(prompt, row.columns[side], tokenization) for side in ("chosen", "rejected")]
        encoded = _encode_marked(marked, tokenization)
        yield from zip(chunk, encoded[::2], encoded[1::2], strict=True)


def encode_prompts(rows: Iterable[Row], tokenization: Tokenization) -> Iterator[tuple[Row, str, np.ndarray]]:
    """Tokenize prompts as `Tokenization.encode_prompt` does; yields the rendered text too."""
    for row in rows:
        with _naming(row):
            prompt = _render_prompt(row.columns["prompt"], tokenization)
            is_text = isinstance(prompt.source, str)
            ids = tokenization.encode_openings([prompt.text])[0] if is_text else tokenization.encode(prompt.text)
            yield row, prompt.text, np.asarray(ids, dtype=np.int32)


def mark_row(row: Row, role: RowRole, tokenization: Tokenization) -> tuple[str, list[Span]]:
    """Return a row's text as it is encoded, end token included, with the character spans of its targets.

    Of a pair it is the chosen answer; a source and its target stand one after the other, each with its end token.
    """
    end, columns = tokenization.eos_token, row.columns
    with _naming(row):
        match role:
            case "text" | "labels":
                marked = _Marked(columns["text"], [(0, len(columns["text"]))], ends=True)
            case "instructions" | "image_text":
                marked = _mark_instruction(row, tokenization)
            case "seq2seq":
                source = _render_prompt(columns["prompt"], tokenization).text + end
                text = source + columns["completion"]
                marked = _Marked(text, [(len(source), len(text))], ends=True)
            case "preferences":
                marked = _mark_answer(_render_prompt(columns["prompt"], tokenization), columns["chosen"], tokenization)
            case "prompts":
                marked = _Marked(_render_prompt(columns["prompt"], tokenization).text, [])
    if not marked.ends or marked.text.endswith(end):
        return marked.text, marked.spans
    *spans, (start, _) = marked.spans
    return marked.text + end, [*spans, (start, len(marked.text + end))]


def encode_answer(prompt: Any, answer: Any, tokenization: Tokenization) -> Encoded:
    """Tokenize one answer after its prompt, as `encode_pairs` does."""
    return _encode_marked([_mark_answer(_render_prompt(prompt, tokenization), answer, tokenization)], tokenization)[0]


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, ROWS_AT_ONCE)):
        yield chunk


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Name the row in errors."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{row.id}: {error}") from None


def _render_prompt(prompt: Any, tokenization: Tokenization) -> _Prompt:
    if isinstance(prompt, str):
        return _Prompt(prompt, prompt)
    return _Prompt(prompt, tokenization.render(prompt, add_generation_prompt=True) if prompt else "")


def _mark_instruction(row: Row, tokenization: Tokenization) -> _Marked:
    columns = row.columns
    if "text" in columns:
        text = columns["text"]
        return _Marked(text, [(0, len(text))], special=True, ends=True)
    if "messages" in columns:
        return _Marked(*tokenization.response_spans(columns["messages"]))
    return _mark_answer(_render_prompt(columns["prompt"], tokenization), columns["completion"], tokenization)


def _mark_answer(prompt: _Prompt, answer: Any, tokenization: Tokenization) -> _Marked:
    """Mark everything after the prompt."""
    if isinstance(prompt.source, str):
        text = prompt.text + answer
        return _Marked(text, [(len(prompt.text), len(text))], special=True, ends=True)
    messages = [*prompt.source, *answer]
    whole = tokenization.render(messages)
    if whole.startswith(prompt.text):
        end = tokenization.turn_end(whole, len(prompt.text))
        return _Marked(whole[:end], [(len(prompt.text), end)])
    text, spans = tokenization.response_spans(messages)
    return _Marked(text, spans[-1:])


def _encode_plain(texts: Sequence[str], tokenization: Tokenization) -> Iterator[Encoded]:
    eos = tokenization.eos_id
    for ids in tokenization.encode_batch(texts, special=True):
        if ids and ids[-1] != eos:
            ids.append(eos)
        yield Encoded(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))


def _encode_marked(marked: Sequence[_Marked], tokenization: Tokenization) -> list[Encoded]:
    """Tokenize each text whole, so that a prompt's tokens are those of generation.

    The borders of responses are found by tokenizing what stands before them; where a token would cross a border the
    text is tokenized in pieces.
    """
    wanted: dict[tuple[str, bool], None] = {}
    for item in marked:
        for border in (len(item.text), *(border for span in item.spans for border in span)):
            wanted[item.text[:border], item.special] = None
    encoded: dict[tuple[str, bool], list[int]] = {}
    for special in (False, True):
        texts = [text for text, needs_special in wanted if needs_special == special]
        ids = tokenization.encode_openings(texts) if special else tokenization.encode_batch(texts)
        encoded |= zip(((text, special) for text in texts), ids, strict=True)
    return [_join(item, encoded, tokenization) for item in marked]


def _join(item: _Marked, encoded: dict[tuple[str, bool], list[int]], tokenization: Tokenization) -> Encoded:
    ids = encoded[item.text, item.special]
    borders: list[int] = []
    for border in (border for span in item.spans for border in span):
        prefix = encoded[item.text[:border], item.special]
        if ids[: len(prefix)] != prefix:
            ids, borders = _in_pieces(item, tokenization)
            break
        borders.append(len(prefix))
    if item.ends and (not ids or ids[-1] != tokenization.eos_id):
        ids = [*ids, tokenization.eos_id]
        borders[-1] = len(ids)
    response = np.zeros(len(ids), dtype=bool)
    for start, end in zip(borders[::2], borders[1::2], strict=True):
        response[start:end] = True
    return Encoded(np.asarray(ids, dtype=np.int32), response)


def _in_pieces(item: _Marked, tokenization: Tokenization) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    borders = []
    start = 0
    for border in (border for span in item.spans for border in span):
        piece = item.text[start:border]
        ids += tokenization.encode_openings([piece])[0] if item.special and start == 0 else tokenization.encode(piece)
        borders.append(len(ids))
        start = border
    return ids + tokenization.encode(item.text[start:]), borders
