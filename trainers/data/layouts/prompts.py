"""Prompts to continue."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from recipes.errors import RequestError
from trainers.data.bad_row import BadRow
from trainers.data.carried import carried
from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import Marked, Prompt, TextSettings, naming, render_prompt
from trainers.data.layouts.arrays import recorded_texts
from trainers.data.rows import Row


@dataclass(frozen=True)
class Prompts:
    """prompt_ids [S] with prompt_offsets [N + 1]; a record of each prompt."""

    name: ClassVar[str] = "prompts"
    version: ClassVar[int] = 2
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["prompts"]] = "prompts"
    text: TextSettings
    carried: tuple[str, ...] = ()
    """Columns of the rows that go with the prompts to what rewards the answers."""

    def identity(self) -> dict[str, Any]:
        """Tokens, and the columns that go with them."""
        carried = {"carried": sorted(self.carried)} if self.carried else {}
        return {**self.text.identity(self.role), **carried}

    def mark(self, row: Row) -> Marked:
        """A prompt is read; nothing of it is learnt."""
        return Marked(self._render(row).text, [])

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str, np.ndarray]]:
        """Tokenize prompts as `Tokenization.encode_prompt` does; yields the rendered text too."""
        tokenization = self.text.tokenization
        for row in map(self.text.ask, rows):
            with naming(row):
                prompt = self._render(row)
                is_text = isinstance(prompt.source, str)
                ids = tokenization.encode_openings([prompt.text])[0] if is_text else tokenization.encode(prompt.text)
                yield row, prompt.text, np.asarray(ids, dtype=np.int32)

    def _render(self, row: Row) -> Prompt:
        return render_prompt(row.columns["prompt"], self.text.tokenization, row.columns.get("tools"))

    def arrays(self, encoded: Iterable[tuple[Row, str, np.ndarray]], fate: Fate) -> Contents:
        """Keep the prompts that fit."""
        kept: list[np.ndarray] = []
        records: list[dict[str, Any]] = []
        for row, text, ids in encoded:
            if len(ids) == 0:
                fate.drop("empty", row)
            elif len(ids) > self.text.sequence_length:
                fate.drop("too_long", row)
            else:
                kept.append(ids)
                records.append(self._record(row, text))
        fate.kept = len(kept)
        return recorded_texts("prompt", kept, records, self.text)

    def _record(self, row: Row, text: str) -> dict[str, Any]:
        columns = row.columns
        tools = {"tools": columns["tools"]} if "tools" in columns else {}
        said = {"prompt": columns["prompt"], "reference": columns.get("reference"), **tools}
        if not self.carried:
            return {"id": row.id, "text": text, **said}
        with naming(row):
            try:
                return {"id": row.id, "text": text, **said, "columns": carried(row.own, self.carried)}
            except BadRow as error:
                raise RequestError(f"{error}; {error.suggestion}" if error.suggestion else str(error)) from None

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `PromptBatch`, padded on the left."""
        from trainers.data.batches import PromptBatch, pad_texts, sample_ids

        texts = pad_texts([dataset.cut("prompt_ids", max(row, 0)) for row in rows], dataset.pad_id, left=True)
        return PromptBatch(texts.input_ids_BT, texts.attention_mask_BT, sample_ids(rows))
