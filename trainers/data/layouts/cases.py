"""Cases of a benchmark: questions with choices, questions to answer freely, pairs of sentences."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from recipes.errors import RequestError
from recipes.stages.answers import CaseForm
from trainers.data.bad_row import BadRow
from trainers.data.carried import carried
from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import Marked, TextSettings
from trainers.data.layouts.arrays import recorded_texts
from trainers.data.rows import Row


@dataclass(frozen=True)
class Cases:
    """case_ids [S] with case_offsets [N + 1], a question and its best answer; a record of each case."""

    name: ClassVar[str] = "cases"
    version: ClassVar[int] = 1
    sides: ClassVar[tuple[str, ...]] = ("case",)
    role: ClassVar[Literal["cases"]] = "cases"
    text: TextSettings
    form: CaseForm
    """The benchmark, which makes cases of rows."""
    carried: tuple[str, ...] = ()
    """Columns of the rows that go with the cases to what scores the answers."""

    @classmethod
    def of(cls, text: TextSettings, form: CaseForm | None, carried: tuple[str, ...]) -> Self:
        """Return the layout of rows whose form is known; no chat template is put around a case."""
        assert form is not None, "cases have a form"
        return cls(replace(text, template="none"), form, carried)

    def identity(self) -> dict[str, Any]:
        """Tokens, and what decides the cases."""
        return {**self.text.identity(self.role), "form": self.form.reading(), "carried": sorted(self.carried)}

    def mark(self, row: Row) -> Marked:
        """Return a question as a model reads it, its best answer marked."""
        try:
            asked, answer = self.form.shown((row.id, row.columns["case"]))
        except ValueError as error:
            raise RequestError(str(error)) from None
        return Marked(f"{asked}{answer}", [(len(asked), len(asked) + len(answer))])

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Any, np.ndarray]]:
        """Yield each case with its first row, and the tokens of its question and best answer; None for a lone half."""
        read: list[Row] = []
        tokenization = self.text.tokenization

        def named() -> Iterator[tuple[str, Any]]:
            for row in rows:
                read.append(row)
                yield row.id, row.columns["case"]

        try:
            for place, case in self.form.cases(named()):
                text = "" if case is None else "".join(case.best)
                yield read[place], case, np.asarray(tokenization.encode(text), dtype=np.int32)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def arrays(self, encoded: Iterable[tuple[Row, Any, np.ndarray]], fate: Fate) -> Contents:
        """Keep the cases that fit."""
        kept: list[np.ndarray] = []
        records: list[dict[str, Any]] = []
        for row, case, ids in encoded:
            if case is None:
                fate.drop("incomplete", row)
            elif len(ids) > self.text.sequence_length:
                fate.drop("too_long", row)
            else:
                kept.append(ids)
                records.append(self._record(row, case))
        fate.kept = len(kept)
        return recorded_texts("case", kept, records, self.text)

    def _record(self, row: Row, case: Any) -> dict[str, Any]:
        asked, answer = case.best
        found = {"id": row.id, "text": asked, "reference": answer.strip(), "case": case.to_json()}
        if not self.carried:
            return found
        try:
            return {**found, "columns": carried(row.columns["case"], self.carried)}
        except BadRow as error:
            raise RequestError(f"{row.id}: {error}; {error.suggestion}") from None

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `PromptBatch` of whole cases, padded on the left."""
        from trainers.data.batches import PromptBatch, pad_texts, sample_ids

        texts = pad_texts([dataset.cut("case_ids", max(row, 0)) for row in rows], dataset.pad_id, left=True)
        return PromptBatch(texts.input_ids_BT, texts.attention_mask_BT, sample_ids(rows))
