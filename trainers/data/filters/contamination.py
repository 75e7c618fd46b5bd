"""Text of evaluation sets in rows to train on, by runs of words (Brown et al. 2020, appendix C)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from recipes.data.filters import ByContamination
from recipes.data.text import Csv, JsonLines, Parquet, PlainSource, TextFiles
from trainers.data.filters.texts import runs, texts_of, words_of
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import read_all

LEAST_WORDS = 5
"""Texts of evaluation sets with fewer words are in too many rows."""


class Contamination:
    """Finds rows that share runs of words with evaluation sets."""

    def __init__(self, settings: ByContamination, base_dir: Path) -> None:
        """Read the evaluation sets; raises SourceError."""
        self._settings = settings
        self._known: dict[int, set[str]] = {}
        for source in evaluation_sources(settings.against):
            for raw in read_all(open_source(source, base_dir)):
                for text in strings(raw.columns):
                    self._note(words_of(text))

    def drops(self, columns: Mapping[str, Any]) -> bool:
        """Tell whether more than the share of a row's runs is known."""
        length, found, known = self._settings.ngram, 0, 0
        for text in texts_of(columns, self._settings.of):
            words = words_of(text)
            if any(run in texts for size, texts in self._shorter() for run in _runs_within(words, size)):
                return True
            own = runs(words, length) if len(words) >= length else []
            found += len(own)
            known += sum(run in self._known.get(length, ()) for run in own)
        return known > self._settings.share * found

    def _note(self, words: list[str]) -> None:
        if len(words) >= LEAST_WORDS:
            length = min(len(words), self._settings.ngram)
            self._known.setdefault(length, set()).update(runs(words, length))

    def _shorter(self) -> Iterator[tuple[int, set[str]]]:
        return ((size, texts) for size, texts in self._known.items() if size < self._settings.ngram)


def evaluation_sources(against: Sequence[str]) -> list[PlainSource]:
    """Return the sources of evaluation sets, each read by the ending of its name."""
    return [_source(pattern) for pattern in against]


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(strings(item) for item in value.values())
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(strings(item) for item in value)


def _source(pattern: str) -> PlainSource:
    name = pattern.rpartition("::")[2]
    endings = [f".{ending}" for ending in Path(name).name.split(".")[1:]]
    if {".jsonl", ".json", ".ndjson"} & set(endings):
        return JsonLines(source="jsonl", files=[pattern])
    if {".csv", ".tsv"} & set(endings):
        return Csv(source="csv", files=[pattern])
    if ".parquet" in endings:
        return Parquet(source="parquet", files=[pattern])
    return TextFiles(source="text", files=[pattern])


def _runs_within(words: list[str], length: int) -> list[str]:
    return runs(words, length) if len(words) >= length else []
