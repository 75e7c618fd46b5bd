"""Rows to token sequences: which tokens, and which of them are the response, by position and never by token id."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from recipes.errors import RequestError
from recipes.stages.answers import Template
from trainers.data.conversation import after_system, as_conversation
from trainers.data.rows import Row
from trainers.data.template import Span, Tools, is_unlearnt
from trainers.data.tokenizer import Tokenization

ROWS_AT_ONCE = 2000


@dataclass(frozen=True)
class TextSettings:
    """How texts become tokens."""

    tokenization: Tokenization
    sequence_length: int
    """Longest sequence in tokens. Text is split, instructions truncated, pairs and prompts dropped; all counted."""
    packing: bool = True
    """Where sequences are packed. False: one row (or one piece of a longer text) a sequence."""
    loss_on: Literal["responses", "all"] = "responses"
    """Of conversations: which tokens are targets. Rows of plain text have targets everywhere."""
    template: Template = "none"
    """Prompts, completions and answers of plain text: chat makes them turns of the chat template."""

    def identity(self, role: str) -> dict[str, Any]:
        """Return what decides the tokens of any layout of such rows."""
        template = {} if self.template == "none" else {"template": self.template}
        tokenizer = self.tokenization.contract_hash
        return {"role": role, "tokenizer": tokenizer, "sequence_length": self.sequence_length, **template}

    def ask(self, row: Row) -> Row:
        """Return the row as it is put to a model: its plain text as turns, where the template says so."""
        if self.template == "none":
            return replace(row, columns=after_system(row.columns)) if "system" in row.columns else row
        with naming(row):
            return replace(row, columns=as_conversation(row.columns))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized text; `response` is True at the tokens of responses."""

    ids: np.ndarray
    response: np.ndarray

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    def part(self, start: int, end: int) -> "Encoded":
        """Return some of the tokens."""
        return Encoded(self.ids[start:end], self.response[start:end])


@dataclass(frozen=True, slots=True)
class Marked:
    """A text with the character spans of its responses, in order; `ends` adds the end token to the last."""

    text: str
    spans: list[Span]
    special: bool = False
    ends: bool = False
    label: str | None = None
    """A target that stands apart from the text."""

    def with_end(self, end: str) -> "Marked":
        """Return the same with the end token in the text."""
        if not self.ends or self.text.endswith(end):
            return self
        *spans, (start, _) = self.spans
        return replace(self, text=self.text + end, spans=[*spans, (start, len(self.text + end))])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it stands in the row, and rendered."""

    source: Any
    text: str
    tools: Tools = None


def encode_texts(rows: Iterable[Row], settings: TextSettings) -> Iterator[tuple[Row, Encoded]]:
    """Tokenize plain texts, with a label or not, with an end token; every token counts as response.

    A text without words has no tokens, also where the tokenizer puts marks around every text.
    """
    (marks,) = encode_plain([""], settings.tokenization)
    for chunk in chunks(rows, settings):
        texts = [row.columns["text"] for row in chunk]
        for row, encoded in zip(chunk, encode_plain(texts, settings.tokenization), strict=True):
            yield row, encoded if len(encoded) > len(marks) else Encoded(encoded.ids[:0], encoded.response[:0])


def encode_instructions(rows: Iterable[Row], settings: TextSettings) -> Iterator[tuple[Row, Encoded]]:
    """Tokenize conversations, prompts with completions, or plain texts."""
    for chunk in chunks(rows, settings):
        marked: list[Marked] = []
        for row in chunk:
            with naming(row):
                marked.append(mark_instruction(row, settings.tokenization))
        yield from zip(chunk, encode_marked(marked, settings.tokenization), strict=True)


def encode_answer(prompt: Any, answer: Any, tokenization: Tokenization, tools: Tools = None) -> Encoded:
    """Tokenize one answer after its prompt, as those of pairs are."""
    asked = render_prompt(prompt, tokenization, tools)
    return encode_marked([mark_answer(asked, answer, tokenization)], tokenization)[0]


def chunks(rows: Iterable[Row], settings: TextSettings) -> Iterator[list[Row]]:
    """Yield rows as they are put to a model, as many at once as are worth a call of the tokenizer."""
    iterator = (settings.ask(row) for row in rows)
    while chunk := list(islice(iterator, ROWS_AT_ONCE)):
        yield chunk


@contextmanager
def naming(row: Row) -> Iterator[None]:
    """Name the row in errors."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{row.id}: {error}") from None


def render_prompt(prompt: Any, tokenization: Tokenization, tools: Tools = None) -> Prompt:
    """Return a prompt with its text as a model reads it; plain text has no place for tools."""
    if isinstance(prompt, str):
        return Prompt(prompt, prompt)
    text = tokenization.render(prompt, tools, add_generation_prompt=True) if prompt else ""
    return Prompt(prompt, text, tools)


def mark_text(row: Row) -> Marked:
    """Mark a whole text, which its end token follows."""
    text = row.columns["text"]
    return Marked(text, [(0, len(text))], special=True, ends=True)


def mark_instruction(row: Row, tokenization: Tokenization) -> Marked:
    """Mark the answers of a conversation, of a prompt, or a whole text."""
    columns = row.columns
    if "text" in columns:
        return mark_text(row)
    if "messages" in columns:
        return Marked(*tokenization.response_spans(columns["messages"], columns.get("tools")))
    prompt = render_prompt(columns["prompt"], tokenization, columns.get("tools"))
    return mark_answer(prompt, columns["completion"], tokenization)


def mark_answer(prompt: Prompt, answer: Any, tokenization: Tokenization) -> Marked:
    """Mark everything after the prompt but the assistant's turns of weight 0."""
    if isinstance(prompt.source, str):
        text = prompt.text + answer
        return Marked(text, [(len(prompt.text), len(text))], special=True, ends=True)
    messages = [*prompt.source, *answer]
    whole = tokenization.render(messages, prompt.tools)
    if whole.startswith(prompt.text) and not any(is_unlearnt(turn) for turn in answer):
        end = tokenization.turn_end(whole, len(prompt.text))
        return Marked(whole[:end], [(len(prompt.text), end)])
    text, spans = tokenization.response_spans(messages, prompt.tools)
    if text.startswith(prompt.text):
        return Marked(text, [span for span in spans if span[0] >= len(prompt.text)])
    return Marked(text, spans[-1:])


def encode_plain(texts: Sequence[str], tokenization: Tokenization) -> Iterator[Encoded]:
    """Tokenize each text whole, with an end token; all of it counts as response."""
    eos = tokenization.eos_id
    for ids in tokenization.encode_batch(texts, special=True):
        if ids and ids[-1] != eos:
            ids.append(eos)
        yield Encoded(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))


def encode_marked(marked: Sequence[Marked], tokenization: Tokenization) -> list[Encoded]:
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


def _join(item: Marked, encoded: dict[tuple[str, bool], list[int]], tokenization: Tokenization) -> Encoded:
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


def _in_pieces(item: Marked, tokenization: Tokenization) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    borders = []
    start = 0
    for border in (border for span in item.spans for border in span):
        piece = item.text[start:border]
        ids += tokenization.encode_openings([piece])[0] if item.special and start == 0 else tokenization.encode(piece)
        borders.append(len(ids))
        start = border
    return ids + tokenization.encode(item.text[start:]), borders
