"""What a reward says of answers whose worth is known, before anything is learnt from it.

A reward that puts noise above the true answers teaches noise; nothing in the curves of a training would show it.
Shapes: B answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from recipes.errors import StageError
from recipes.stages.rewards.term import Term
from recipes.stages.suites import NOISE, TRUTH
from rlhf.text.known_answers import AnsweredPrompt, Noise, as_responses, truly_answered
from rlhf.text.policy import PolicyModels
from rlhf.text.rewards import TextReward
from trainers.data.tokenizer import Tokenization
from trainers.runtime.distributed import gather_json, rank

NUM_ROWS = 64
"""Prompts with a true answer that are asked about."""
ROWS_AT_ONCE = 16

Table = Mapping[str, Mapping[str, float]]
"""Mean of each term, and `score`, by kind of answer."""


@dataclass(frozen=True)
class Probe:
    """What is asked, and by whom it is answered."""

    reward: TextReward
    rewards: Mapping[str, Term]
    models: PolicyModels
    tokenization: Tokenization
    max_new_tokens: int
    seed: int

    def table(self) -> Table:
        """Let every term score true answers, those of other prompts, first halves, and random tokens; collective.

        Empty where no prompt has a true answer that fits. `score` is the weighted sum as a policy learns it.
        """
        rows = self._rows()
        if not rows:
            return {}
        noise = Noise.of(self.tokenization, self.seed)
        other = [*rows[1:], rows[0]]
        kinds = {
            TRUTH: rows,
            "other_answers": [row.answered(by.answer) for row, by in zip(rows, other, strict=True)],
            "first_halves": [row.answered(row.answer[: len(row.answer) // 2]) for row in rows if len(row.answer) > 2],
            NOISE: [noise.like(row) for row in rows],
        }
        return {name: self._means(answered) for name, answered in kinds.items() if answered}

    def _rows(self) -> list[AnsweredPrompt]:
        """Prompts with their true answers, evenly from the whole set."""
        records = self.reward.records
        found: list[AnsweredPrompt] = []
        for row in range(0, len(records), max(1, len(records) // (2 * NUM_ROWS))):
            answered = truly_answered(row, records[row], self.rewards, self.tokenization)
            if answered is not None and len(answered.answer) <= self.max_new_tokens:
                found.append(answered)
            if len(found) == NUM_ROWS:
                break
        return found

    @torch.no_grad()
    def _means(self, answered: Sequence[AnsweredPrompt]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for start in range(0, len(answered), ROWS_AT_ONCE):
            responses = as_responses(answered[start : start + ROWS_AT_ONCE], self.tokenization.pad_id)
            responses = responses.to(next(self.models.parameters()).device)
            (read, *_) = gather_json(self.reward.read(responses) if rank() == 0 else None)
            scores = []
            if self.reward.judges:
                scores.append(self.models(responses, ("reward",), False, self.max_new_tokens)["scores_B"].cpu())
            by_term = self.reward.by_term(read, *scores)
            for name, value_B in {**by_term, "score": self.reward.score(by_term)}.items():
                totals[name] = totals.get(name, 0.0) + float(value_B.double().sum())
        return {name: total / len(answered) for name, total in totals.items()}


def table_text(table: Table) -> str:
    """The table as people read it."""
    names = list(next(iter(table.values())))
    lines = [["", *names], *([kind, *(f"{found[name]:.3f}" for name in names)] for kind, found in table.items())]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names) + 1)]
    rows = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


def probe_finding(table: Table) -> str | None:
    """Why nothing should be learnt from this reward; None: truth beats noise, or there is no truth to ask about."""
    if not table or table[TRUTH]["score"] > table[NOISE]["score"]:
        return None
    return (
        "the reward scores random tokens as high as the true answers or higher, so that a policy would learn noise:\n"
        f"{table_text(table)}\nanother reward or other weights; probe: warn continues all the same"
    )


def require_truth(table: Table, probe: str) -> str | None:
    """What to warn of; raises StageError where the recipe refuses a reward that fails."""
    finding = probe_finding(table)
    if finding is not None and probe == "refuse":
        raise StageError(finding)
    return finding
