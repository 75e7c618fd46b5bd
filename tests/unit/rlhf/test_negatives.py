"""Answers that a reward stage makes itself: which, from what, and that they follow from seed, step and row."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from recipes.stages.reward import Negatives
from rlhf.text.negatives import MadeAnswers, kind_of, sampled_rows
from trainers.data.batches import BatchPlan, PairBatch, build_batch
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.arrays import cut_up, flat
from trainers.data.layouts.pairs import Pairs

END, ROWS = 1, 8
PROMPT = [30, 31]


def chosen(row: int) -> list[int]:
    return [40 + row, 50 + row, 60 + row, 70 + row]


def pairs() -> Dataset:
    """Row r has the chosen answer 40+r, 50+r, 60+r, 70+r, and rejects 99."""
    arrays: dict[str, np.ndarray] = {}
    for side, answers in (("chosen", [chosen(row) for row in range(ROWS)]), ("rejected", [[99]] * ROWS)):
        whole = [np.array([*PROMPT, *answer, END]) for answer in answers]
        arrays |= cut_up(side, whole, np.int32)
        arrays[f"{side}_response"] = flat([np.arange(len(ids)) >= len(PROMPT) for ids in whole], np.bool_)
    return Dataset("d" * 64, Pairs, BuildReport(ROWS, {"sequences": ROWS}), arrays)


def answers(batch: PairBatch) -> list[list[int]]:
    side = batch.rejected
    return [ids[mask].tolist() for ids, mask in zip(side.input_ids_BT, side.response_mask_BT, strict=True)]


def made(written: dict[int, list[int]] | None = None, longest: int = 64, **shares: float) -> list[list[int]]:
    source = MadeAnswers(Negatives(**shares), pairs(), range(200, 300), 3, longest, written or {})
    batch: Any = build_batch(pairs(), range(ROWS))
    found = source.replaced(batch, step=5)
    assert found.chosen is batch.chosen
    prompts = found.rejected.attention_mask_BT & ~found.rejected.response_mask_BT
    assert [ids[mask].tolist() for ids, mask in zip(found.rejected.input_ids_BT, prompts, strict=True)] == [
        PROMPT
    ] * ROWS
    assert answers(source.replaced(batch, step=5)) == answers(found)
    return answers(found)


def test_halves_noise_and_others_answers() -> None:
    assert made(first_halves=1.0) == [[40 + row, 50 + row, END] for row in range(ROWS)]
    noise = made(random_tokens=1.0)
    assert all(len(answer) == 5 and answer[-1] == END and min(answer[:-1]) >= 200 for answer in noise)
    others = made(other_answers=1.0)
    for row, answer in enumerate(others):
        assert answer == [99, END] or (answer[:-1] in [chosen(other) for other in range(ROWS) if other != row])


def test_a_sample_that_is_the_chosen_answer_or_too_long_leaves_the_pair_as_it_was() -> None:
    found = made({0: chosen(0), 1: [7], 2: list(range(9))}, longest=10, samples=1.0)
    assert found == [[99, END], [7, END], *[[99, END]] * 6]


def test_shares_are_kept_and_every_step_draws_again() -> None:
    spec = Negatives(samples=0.25, random_tokens=0.5)
    kinds = Counter(kind_of(spec, 0, step, row) for step in range(100) for row in range(40))
    assert kinds["random_tokens"] == pytest.approx(2000, abs=120)
    assert kinds["samples"] == pytest.approx(1000, abs=120)
    plan = BatchPlan(pairs(), 0, 4, 1, 0, 4)
    rows = sampled_rows(spec, plan, 0, 3)
    wanted = {row for step in range(3) for row in plan.sample_ids(step) if kind_of(spec, 0, step, row) == "samples"}
    assert rows == sorted(wanted)
    assert sampled_rows(Negatives(random_tokens=1.0), plan, 0, 3) == []


def test_fillers_stay() -> None:
    source = MadeAnswers(Negatives(random_tokens=1.0), pairs(), [200], 0, 64, {})
    batch: Any = build_batch(pairs(), [0, -1])
    found = source.replaced(batch, 0)
    assert answers(found) == [[200, 200, 200, 200, END], [99, END]]
    assert torch.equal(found.sample_ids_B, batch.sample_ids_B)


@pytest.mark.parametrize("shares", [{}, {"samples": 0.6, "random_tokens": 0.6}])
def test_shares_that_cannot_be(shares: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Negatives(**shares)
