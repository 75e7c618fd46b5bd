"""A source's filters on its rows, in their order: which are left out, by which filter, and some of them to look at."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from recipes.data.filters import (
    ByContamination,
    ByDuplicate,
    ByLanguage,
    ByLength,
    ByNearDuplicate,
    ByPattern,
    Filter,
)
from recipes.problem_codes import Code
from trainers.data.filters.contamination import Contamination
from trainers.data.filters.language import Languages
from trainers.data.filters.similar import Duplicates, NearDuplicates
from trainers.data.filters.texts import text_of, words_of
from trainers.data.sources.reader import SourceError

KEPT_EXAMPLES = 100
"""Rows of each reason that are kept to look at."""
ROWS_A_BEAT = 256
_PACKAGES: dict[type, str] = {ByLanguage: "py3langid", ByNearDuplicate: "rensa"}
CountTokens = Callable[[str], int]


class Dropper(Protocol):
    """One filter at work."""

    def drops(self, columns: Mapping[str, Any]) -> bool:
        """Tell whether a row in its role's form is left out; rows are asked about once, in their order."""


class NamedRow(Protocol):
    """What a filter reads of a row."""

    @property
    def id(self) -> str:
        """Where it came from."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """What it holds."""


@dataclass
class LeftOut:
    """Rows that filters left out."""

    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Reason -> the first rows, each with its id and its columns."""

    def note(self, reason: str, row: NamedRow, source: str = "") -> None:
        """Count a row."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < KEPT_EXAMPLES:
            examples.append({"row": f"{source}/{row.id}" if source else row.id, **row.columns})


R = TypeVar("R", bound=NamedRow)


def open_filters(
    filters: Sequence[Filter], base_dir: Path, count_tokens: CountTokens | None
) -> list[tuple[str, Dropper]]:
    """Make filters ready, each with its reason; raises SourceError naming the one that cannot work.

    Without `count_tokens` no row is left out by its tokens: the tokenizer is yet to be trained.
    """
    found: list[tuple[str, Dropper]] = []
    for number, settings in enumerate(filters):
        try:
            found.append((settings.reason, open_filter(settings, base_dir, count_tokens)))
        except SourceError as error:
            raise SourceError(error.code, error.message, error.suggestion, f"filter.{number}") from None
    return found


@dataclass
class Filtering:
    """What filters need besides a source's rows, and what they left out."""

    count_tokens: CountTokens | None = None
    """Of the stage's tokenizer; None: it is yet to be trained."""
    on_rows: Callable[[int], None] | None = None
    """Called with the number of rows of a source that were examined, every `ROWS_A_BEAT` rows."""
    left_out: LeftOut = field(default_factory=LeftOut)

    def kept(
        self, rows: Callable[[], Iterator[R]], filters: Sequence[tuple[str, Dropper]], source: str = ""
    ) -> Callable[[], Iterator[R]]:
        """Return what gives the rows that no filter leaves out; every row is looked at once, here.

        `source` is the name of the rows' source in a mixture.
        """
        if not filters:
            return rows
        verdicts = bytearray()
        for row in rows():
            reason = next((reason for reason, dropper in filters if dropper.drops(row.columns)), "")
            if reason:
                self.left_out.note(reason, row, source)
            verdicts.append(not reason)
            if self.on_rows is not None and len(verdicts) % ROWS_A_BEAT == 0:
                self.on_rows(len(verdicts))
        return lambda: compress(rows(), verdicts)


def open_filter(settings: Filter, base_dir: Path, count_tokens: CountTokens | None) -> Dropper:
    """Make one filter ready; raises SourceError where it cannot work."""
    package = _PACKAGES.get(type(settings))
    if package is not None and find_spec(package) is None:
        message = f"by: {settings.by} needs the package {package}"
        raise SourceError(Code.UNMET_REQUIREMENT, message, 'pip install "trainwright[filters]"')
    match settings:
        case ByLength():
            return _Length(settings, count_tokens)
        case ByLanguage():
            return Languages(settings)
        case ByPattern():
            return _Pattern(settings)
        case ByDuplicate():
            return Duplicates(settings)
        case ByNearDuplicate():
            return NearDuplicates(settings)
        case ByContamination():
            return Contamination(settings, base_dir)


class _Length:
    def __init__(self, settings: ByLength, count_tokens: CountTokens | None) -> None:
        self._settings = settings
        self._is_known = settings.unit != "tokens" or count_tokens is not None
        self._count = {"characters": len, "words": _num_words, "tokens": count_tokens or len}[settings.unit]

    def drops(self, columns: Mapping[str, Any]) -> bool:
        length, settings = self._count(text_of(columns, self._settings.of)), self._settings
        is_short = settings.least is not None and length < settings.least
        return self._is_known and (is_short or (settings.most is not None and length > settings.most))


def _num_words(text: str) -> int:
    return len(words_of(text))


class _Pattern:
    def __init__(self, settings: ByPattern) -> None:
        self._settings = settings
        self._pattern = re.compile(settings.drop or settings.keep or "", re.IGNORECASE if settings.ignore_case else 0)

    def drops(self, columns: Mapping[str, Any]) -> bool:
        is_found = self._pattern.search(text_of(columns, self._settings.of)) is not None
        return is_found == (self._settings.drop is not None)
