"""One stream of tokens that recurrent models read on in."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np

from recipes.data.text import Mix
from recipes.errors import RequestError
from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import Encoded, Marked, TextSettings, encode_texts, mark_text
from trainers.data.layouts.arrays import flat, offsets, text_holds, token_type
from trainers.data.mixed_order import texts_by_tokens
from trainers.data.packing import scattered
from trainers.data.rows import Row

_Text = tuple[Row, Encoded]


@dataclass(frozen=True)
class Stream:
    """tokens and is_first (True at a text's first token) [S], the texts in a scattered order, each with its end.

    Of a mixture with weights the sources take turns, and a text may stand in the stream several times.
    """

    name: ClassVar[str] = "stream"
    version: ClassVar[int] = 1
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["text"]] = "text"
    text: TextSettings
    mix: Mix | None = None
    """The mixture whose weights decide what the stream holds; None: every text once."""

    def identity(self) -> dict[str, Any]:
        """Tokens, and the weights that they come by."""
        weighed = {} if self.mix is None else {"weights": self.mix.weights, "until": self.mix.until}
        return {**self.text.identity(self.role), "form": "stream", **weighed}

    def mark(self, row: Row) -> Marked:
        """All of a text is learnt."""
        return mark_text(row)

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded]]:
        """Tokenize each text."""
        return encode_texts(rows, self.text)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded]], fate: Fate) -> Contents:
        """Join the texts."""
        kept: list[tuple[Row, Encoded]] = []
        for row, item in encoded:
            if len(item) < 2:
                fate.drop("empty", row)
            else:
                kept.append((row, item))
        fate.kept = len(kept)
        kept = [kept[number] for number in sorted(range(len(kept)), key=scattered)]
        ordered = kept if self.mix is None else list(_weighted(kept, self.mix))
        tokens = flat([item.ids for _, item in ordered], token_type(self.text))
        is_first = np.zeros(len(tokens), dtype=bool)
        is_first[offsets([len(item) for _, item in ordered])[:-1]] = True
        sequences = max(len(tokens) // self.text.sequence_length, min(len(kept), 1))
        return Contents(
            arrays={"tokens": tokens, "is_first": is_first},
            row_ids=[row.id for row, _ in kept],
            holds=text_holds(sequences, len(tokens), len(tokens) - len(ordered), len(tokens)),
            learns_nothing=not kept,
            drawn={} if self.mix is None else _drawn(kept, ordered, self.mix),
        )

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> NoReturn:
        """A stream has lanes, not rows: `trainers.data.streams`."""
        raise ValueError("a stream is read in lanes; it has no batches of rows")


def _weighted(kept: Sequence[_Text], mix: Mix) -> Iterator[_Text]:
    """Yield the texts of a mixture as its weights have it; raises RequestError for a source without any."""
    names, shares = [member.name for member in mix.members()], mix.weights
    assert shares is not None
    groups = [[item for item in kept if item[0].source == name] for name in names]
    if empty := next((name for name, texts in zip(names, groups, strict=True) if not texts), None):
        raise RequestError(f"source {empty} has a weight, and no text to draw; remove it from the mixture")
    lengths = [[len(item) for _, item in texts] for texts in groups]
    for source, place in texts_by_tokens(lengths, shares, mix.until):
        yield groups[source][place]


def _drawn(kept: Sequence[_Text], ordered: Sequence[_Text], mix: Mix) -> dict[str, dict[str, Any]]:
    """Return for each source of a mixture the stream's tokens, their share, and how often the source was read."""
    held, own, total = Counter[str](), Counter[str](), sum(len(item) for _, item in ordered)
    for counts, texts in ((held, ordered), (own, kept)):
        for row, item in texts:
            counts[row.source] += len(item)
    return {
        member.name: {
            "tokens": held[member.name],
            "share": held[member.name] / max(total, 1),
            "epochs": held[member.name] / max(own[member.name], 1),
        }
        for member in mix.members()
    }
