"""Pairs of sentences that differ in who is spoken of: which of the two the model finds more likely."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from recipes.fields import meaning
from recipes.stages.benchmarks.case import Benchmark, Case, Likelihood, Named, Option, Row, UnfitRow, text_column

PairLayout = Literal["crows_pairs", "winobias", "winogender"]


@dataclass(frozen=True, slots=True)
class Sides:
    """The sentences of a row, by their places in their pair."""

    key: str
    """Equal for rows of one pair."""
    sentences: dict[int, str]
    group: str = ""


class PairLikelihood(Benchmark):
    """Likelihood of the two sentences of a pair: `prefers_first`, the share of pairs whose first sentence is likelier
    (0.5 is no preference), by kind of bias too, and `difference`, the mean distance of their log-likelihoods in nats.

    The first is the more stereotyped one (CrowS-Pairs' sent_more, WinoBias' pro-stereotyped one), or that about a man.
    """

    suite: Literal["pairs"] = meaning(description="Which sentence of a pair is likelier.")
    layout: PairLayout = meaning(
        description="crows_pairs: {sent_more, sent_less, bias_type}; winogender: {sentid, sentence}; winobias: the "
        "lines of a pro_ and an anti_ file, read as csv by `header: [sentence]`, `delimiter: '|'`, `quotes: false`."
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("prefers_first", "difference")

    @property
    def judged(self) -> tuple[str, ...]:
        return ()

    def cases(self, rows: Iterable[Named]) -> Iterator[tuple[int, Case | None]]:
        """Pairs in the order of their first rows; None for a sentence whose other one is not among the rows."""
        first: dict[str, int] = {}
        found: dict[str, Sides] = {}
        for place, (name, row) in enumerate(rows):
            sides = self._sides(name, row)
            if not sides.sentences:
                continue
            known = found.setdefault(sides.key, sides)
            first.setdefault(sides.key, place)
            known.sentences.update(sides.sentences)
        for key, sides in found.items():
            if len(sides.sentences) < 2:
                yield first[key], None
            else:
                options = tuple(Option("", sides.sentences[side]) for side in (0, 1))
                yield first[key], Case(options, group=sides.group)

    def shown(self, row: Named) -> tuple[str, str]:
        return "", next(iter(self._sides(*row).sentences.values()), "")

    def values(self, found: Sequence[Likelihood], case: Case) -> dict[str, float]:
        first, second = (each.nats for each in found)
        return {"prefers_first": 0.5 if first == second else float(first > second), "difference": abs(first - second)}

    def _sides(self, name: str, row: Row) -> Sides:
        try:
            return LAYOUTS[self.layout](name, row)
        except UnfitRow as error:
            raise UnfitRow(f"{name}: {error}") from None


def _crows_pairs(name: str, row: Row) -> Sides:
    sentences = {0: text_column(row, "sent_more"), 1: text_column(row, "sent_less")}
    return Sides(name, sentences, str(row.get("bias_type", "")))


def _winogender(name: str, row: Row) -> Sides:
    """A sentence with a man's, a woman's or a neutral pronoun, which its id tells; neutral ones are left out."""
    found = re.fullmatch(r"(.+)\.(male|female|neutral)(?:\.txt)?", text_column(row, "sentid"))
    if found is None:
        raise UnfitRow(f"sentid is {row['sentid']!r}, not OCCUPATION.PARTICIPANT.NUMBER.male.txt or the like")
    place = {"male": 0, "female": 1}.get(found[2])
    return Sides(found[1], {} if place is None else {place: text_column(row, "sentence")})


_MARKED = re.compile(r"\[([^\]]*)\]")


def _winobias(name: str, row: Row) -> Sides:
    """A line `1 [The developer] ... [she] ...` of a file whose name says whether it follows the stereotype."""
    line = re.sub(r"^\d+ ", "", text_column(row, "sentence").strip())
    file = name.rpartition("/")[2]
    place = 0 if file.startswith("pro_") else 1 if file.startswith("anti_") else None
    if place is None:
        raise UnfitRow("the file's name starts with neither pro_ nor anti_")
    if len(_MARKED.findall(line)) < 2:
        raise UnfitRow(f"{line[:80]!r} has no two parts in brackets: who is spoken of, and a pronoun")
    pronouns = {"he", "she", "him", "her", "his", "hers"}
    key = _MARKED.sub(lambda found: "[_]" if found[1].lower() in pronouns else found[0], line)
    kind = re.search(r"type\d", file)
    return Sides(f"{kind[0] if kind else ''} {key}", {place: _MARKED.sub(r"\1", line)}, kind[0] if kind else "")


LAYOUTS: dict[PairLayout, Callable[[str, Row], Sides]] = {
    "crows_pairs": _crows_pairs,
    "winobias": _winobias,
    "winogender": _winogender,
}
