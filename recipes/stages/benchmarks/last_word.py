"""LAMBADA (Paperno et al. 2016): whether a model finds a text's last word."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from recipes.fields import meaning
from recipes.stages.benchmarks.case import Benchmark, Case, Likelihood, Named, Option, Row, UnfitRow, text_column


class LastWord(Benchmark):
    """`acc`, the share of rows whose last word is what the model would write, and `logprob`, its mean log-likelihood in
    nats; lm-eval's perplexity is exp(-logprob).
    """

    suite: Literal["last_word"] = meaning(
        description="Rows {text}, or {context, continuation}, as LAMBADA: the last word is to be found."
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("acc", "logprob")

    def cases(self, rows: Iterable[Named]) -> Iterator[tuple[int, Case]]:
        for place, (name, row) in enumerate(rows):
            try:
                yield place, Case((_option(row),), (0,))
            except UnfitRow as error:
                raise UnfitRow(f"{name}: {error}") from None

    def shown(self, row: Named) -> tuple[str, str]:
        ((_, case),) = self.cases([row])
        return case.best

    def values(self, found: Sequence[Likelihood], case: Case) -> dict[str, float]:
        (own,) = found
        return {"acc": float(own.is_greedy), "logprob": own.nats}

    def picked(self, logprobs: Sequence[float], case: Case) -> str:
        return case.best[1].strip()


def _option(row: Row) -> Option:
    if "continuation" in row:
        return Option(text_column(row, "context"), f" {text_column(row, 'continuation').strip()}")
    before, space, word = text_column(row, "text").rpartition(" ")
    if not space or not word:
        raise UnfitRow("column 'text' has no last word after a space")
    return Option(before, f" {word}")
