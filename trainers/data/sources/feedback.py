"""Preferences that a feedback stage makes: nothing to read before it has run, and files of rows for a worker after."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from recipes.data.text import FeedbackPairs
from recipes.problem_codes import Code
from trainers.data.sources.reader import Part, SourceError


@dataclass(frozen=True, slots=True)
class FeedbackReader:
    """The set before it is there: its digest is that of any, since the stage that makes it is an input."""

    source: FeedbackPairs
    is_remote = True

    def parts(self) -> Iterator[Part]:
        """Raise SourceError: a run reads what the stage has made instead."""
        raise SourceError(Code.UNREADABLE_DATA, f"{self.source.from_} is read by a run, once it is there", field="from")

    def digest(self) -> str:
        """Return the same for all sets."""
        return hashlib.sha256(b"feedback").hexdigest()

    def files(self) -> None:
        """Return None: a store has them."""
        return
