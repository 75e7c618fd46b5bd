"""Pure text work on docstrings: paragraphs, first sentences, and when two texts are near copies."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

SHINGLE_WORDS = 4
"""Texts are compared by their runs of this many words."""
NEAR_COPY_SHARE = 0.5
"""Two texts that share this part of the smaller one's runs are near copies."""
MIN_SHINGLES = 3
"""Texts with fewer runs (6 words or less) are copies only when all their words are equal."""

_SIGNATURE = re.compile(r"[\w.]+\s*\([^()]*(\([^()]*\)[^()]*)*\)\s*(->.*|:|=.*)?")
_ROLE = re.compile(r":[a-z:]+:`~?([^`]*)`")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'(<`*])")
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|etc|vs|cf|resp|approx|no|al|eg|ie)|\b[A-Z])\.$", re.IGNORECASE)
_RULE = re.compile(r"([*=\-~^#+.])\1{3,}")
_WORD = re.compile(r"[a-z0-9]+")
_EMPHASIS = re.compile(r"(?<!\w)\*{1,2}(\w+)\*{1,2}(?!\w)")
_OWN_NAME = re.compile(r"^[\w.]+\s+(--?|:)\s+(?=[A-Z])|^[\w.]+\.py\s*[-:]+\s*|^Internal function\.\s+|^Internal:\s+")
_CODE = re.compile(r">>>|\.\.\. |[{}|\\=\[\]<>~^]|->|::|^[-*#@:]|gencodec|\w\(\w+\) |//|^[\w.]+\(|\b\w [-+*/%] \w\b")


def paragraphs(text: str) -> list[str]:
    """Split at blank lines; prose is joined into one line, code, lists and tables keep their lines."""
    return [_reflow(block) for block in re.split(r"\n[ \t]*\n", text) if block.strip()]


def _reflow(block: str) -> str:
    lines = [line.rstrip() for line in block.strip("\n").expandtabs().split("\n")]
    lines = [line for line in lines if not _RULE.fullmatch(line.strip())] or [""]
    indents = {len(line) - len(line.lstrip()) for line in lines}
    if ">>>" in block or len(indents) > 1 or any(re.search(r"\S {2,}\S(?<!\. {2}\S)", line) for line in lines):
        return "\n".join(line[min(indents) :] for line in lines)
    return " ".join(line.strip() for line in lines)


def plain(text: str) -> str:
    """Join lines and remove reStructuredText marks."""
    text = _ROLE.sub(r"\1", text).replace("``", "").replace("`", "'")
    return " ".join(_EMPHASIS.sub(r"\1", text).split())


def summary(doc: str, *, min_words: int = 3, max_words: int = 24) -> str | None:
    """Return a docstring's first sentence, capitalised and ended by a period; None where that is no sentence.

    Leading lines that repeat the signature are passed over.
    """
    sentence = _first_sentence(_opening(doc).text).rstrip(" :;,-")
    if not sentence or _CODE.search(sentence) or not sentence.isascii():
        return None
    words = sentence.split()
    if not min_words <= len(words) <= max_words or sum(word[0].isalpha() for word in words) < len(words) / 2:
        return None
    if not words[0][0].isalpha():
        return None
    if words[0].isalpha() and words[0].islower():
        sentence = sentence[0].upper() + sentence[1:]
    return sentence if sentence.endswith((".", "!", "?", '."', ".)")) else f"{sentence}."


def body(doc: str) -> list[str]:
    """Return what follows a docstring's first sentence, by paragraphs."""
    opening = _opening(doc)
    rest = opening.text[len(_first_sentence(opening.text)) :].strip()
    return [*([rest] if rest else []), *paragraphs("\n\n".join(opening.further))]


@dataclass(frozen=True, slots=True)
class _Opening:
    """The paragraph that a docstring begins with, on one line, and the ones after it."""

    text: str
    further: list[str]


def _opening(doc: str) -> _Opening:
    """Find where a docstring begins behind lines that repeat its signature or its name."""
    blocks = [block for block in re.split(r"\n[ \t]*\n", doc) if block.strip()]
    while blocks and (trimmed := _without_signatures(blocks[0])) != blocks[0]:
        blocks = [trimmed, *blocks[1:]] if trimmed else blocks[1:]
    if len(blocks) > 1 and plain(blocks[0]) in ("Internal function.", "Internal function"):
        blocks = blocks[1:]
    return _Opening(_OWN_NAME.sub("", plain(blocks[0])), blocks[1:]) if blocks else _Opening("", [])


def _without_signatures(block: str) -> str:
    lines = block.strip("\n").split("\n")
    while lines and _SIGNATURE.fullmatch(lines[0].strip()):
        lines.pop(0)
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    for match in _SENTENCE_END.finditer(text):
        head = text[: match.end()].rstrip()
        if not _ABBREVIATION.search(head):
            return head
    return text


def words(text: str) -> tuple[str, ...]:
    """Return the lower-case words; what comparisons are made of."""
    return tuple(_WORD.findall(text.lower()))


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the runs of words of a text; a short one is a single run."""
    found = words(text)
    if len(found) < SHINGLE_WORDS + MIN_SHINGLES - 1:
        return frozenset((found,)) if found else frozenset()
    return frozenset(tuple(found[i : i + SHINGLE_WORDS]) for i in range(len(found) - SHINGLE_WORDS + 1))


def is_near_copy(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> bool:
    """Tell whether two texts, given by their shingles, are equal in words or share most of the smaller one."""
    smaller = min(len(one), len(other))
    return smaller > 0 and len(one & other) >= max(NEAR_COPY_SHARE * smaller, 1)


class CopyIndex:
    """Finds near copies of a set of texts; looks only at the texts that share a run of words."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [shingles(text) for text in texts]
        self._holders: dict[tuple[str, ...], list[int]] = {}
        for number, runs in enumerate(self._texts):
            for run in sorted(runs):
                self._holders.setdefault(run, []).append(number)

    def has_near_copy(self, text: str) -> bool:
        """Tell whether any of the texts is a near copy of this one."""
        runs = shingles(text)
        shared: dict[int, int] = {}
        for run in runs:
            for number in self._holders.get(run, ()):
                shared[number] = shared.get(number, 0) + 1
        return any(
            count >= max(NEAR_COPY_SHARE * min(len(runs), len(self._texts[number])), 1)
            for number, count in shared.items()
        )
