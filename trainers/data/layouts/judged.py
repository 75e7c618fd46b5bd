"""Single answers with a verdict."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from trainers.data.dataset import Contents, Dataset, Fate
from trainers.data.encoding import (
    Encoded,
    Marked,
    TextSettings,
    chunks,
    encode_marked,
    mark_answer,
    naming,
    render_prompt,
)
from trainers.data.layouts.arrays import response_arrays, text_holds
from trainers.data.rows import Row


@dataclass(frozen=True)
class Judged:
    """{answer,mismatched}_{ids,response} [S] with {answer,mismatched}_offsets [N + 1], is_desirable [N].

    The mismatched text of a row is its prompt with the answer of the next row that has another prompt, cut where it is
    too long: pairs of that kind estimate how far a policy is from its reference (Ethayarajh et al. 2024, section 4.1).
    """

    name: ClassVar[str] = "judged"
    version: ClassVar[int] = 1
    sides: ClassVar[tuple[str, ...]] = ("answer", "mismatched")
    role: ClassVar[Literal["judged"]] = "judged"
    text: TextSettings

    def identity(self) -> dict[str, Any]:
        """Tokens alone."""
        return self.text.identity(self.role)

    def mark(self, row: Row) -> Marked:
        """The answer after its prompt; its verdict stands apart from it."""
        prompt = render_prompt(row.columns["prompt"], self.text.tokenization)
        return mark_answer(prompt, row.columns["completion"], self.text.tokenization)

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded]]:
        """Tokenize each answer after its prompt; everything after the prompt is the response."""
        for chunk in chunks(rows, self.text):
            marked: list[Marked] = []
            for row in chunk:
                with naming(row):
                    marked.append(self.mark(row))
            yield from zip(chunk, encode_marked(marked, self.text.tokenization), strict=True)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded]], fate: Fate) -> Contents:
        """Keep the answers that fit, and give each prompt another one's answer."""
        kept: list[tuple[Row, Encoded]] = []
        for row, item in encoded:
            if not item.response.any():
                fate.drop("no_response", row)
            elif len(item) > self.text.sequence_length:
                fate.drop("too_long", row)
            else:
                kept.append((row, item))
        fate.kept = len(kept)
        answers = [item for _, item in kept]
        arrays: dict[str, np.ndarray] = {}
        for side, items in zip(self.sides, (answers, mismatched(answers, self.text.sequence_length)), strict=True):
            arrays |= response_arrays(side, items, self.text)
        tokens, supervised = len(arrays["answer_ids"]), int(arrays["answer_response"].sum())
        verdicts = np.array([row.columns["label"] for row, _ in kept], dtype=np.bool_)
        return Contents(
            arrays={**arrays, "is_desirable": verdicts},
            row_ids=[row.id for row, _ in kept],
            holds=text_holds(len(kept), tokens, supervised, tokens),
            learns_nothing=not kept,
        )

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return a `JudgedBatch`."""
        import torch

        from trainers.data.batches import JudgedBatch, sample_ids, sequence_batch

        taken = [max(row, 0) for row in rows]
        answers, others = (
            sequence_batch(
                [dataset.cut(f"{side}_ids", row) for row in taken],
                [dataset.cut(f"{side}_response", row) for row in taken],
                dataset.pad_id,
            )
            for side in Judged.sides
        )
        verdicts = torch.from_numpy(np.array(dataset.arrays["is_desirable"][taken]))
        return JudgedBatch(answers, others, verdicts, sample_ids(rows))


def mismatched(answers: Sequence[Encoded], longest: int) -> list[Encoded]:
    """Return each prompt with the answer of the next row that has another prompt; of one prompt alone, of the next."""
    starts = [int(item.response.argmax()) for item in answers]
    prompts = [item.ids[:start].tobytes() for item, start in zip(answers, starts, strict=True)]
    count = len(answers)
    others = [(row + 1) % count for row in range(count)]
    has_several = len(set(prompts)) > 1
    for row in reversed(range(2 * count)) if has_several else ():  # twice around: the last rows find the first ones
        this, after = row % count, (row + 1) % count
        others[this] = others[after] if prompts[this] == prompts[after] else after
    found = []
    for item, start, other in zip(answers, starts, others, strict=True):
        added = answers[other].part(starts[other], len(answers[other]))
        whole = Encoded(
            np.concatenate([item.ids[:start], added.ids]), np.concatenate([item.response[:start], added.response])
        )
        found.append(whole.part(0, longest))
    return found
