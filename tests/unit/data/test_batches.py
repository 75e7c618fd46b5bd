"""Batches: the same samples for any number of workers, positions, padding, fillers."""

import numpy as np
import pytest
import torch

from trainers.data.batches import BatchPlan, PairBatch, PromptBatch, TokenBatch, build_batch, evaluation_batches
from trainers.data.dataset import BuildReport, DataLayout, Dataset
from trainers.data.layouts.packed import Packed
from trainers.data.layouts.pairs import Pairs
from trainers.data.layouts.prompts import Prompts

PAD = 0


def dataset(layout: type[DataLayout], arrays: dict[str, np.ndarray], rows: int) -> Dataset:
    return Dataset("d" * 64, layout, BuildReport(rows, {"sequences": rows}), arrays, PAD)


def packed(rows: int = 40, length: int = 8) -> Dataset:
    """Row r holds r + 1 in every token; two segments of 3 tokens and two of padding."""
    segments = np.tile(np.array([1, 1, 1, 2, 2, 2, 0, 0], dtype=np.uint16), (rows, 1))
    ids = np.where(segments > 0, np.arange(1, rows + 1)[:, None], PAD).astype(np.uint16)
    mask = np.tile(np.array([0, 1, 1, 0, 0, 1, 0, 0], dtype=bool), (rows, 1))
    return dataset(Packed, {"input_ids": ids, "segment_ids": segments, "loss_mask": mask}, rows)


def pairs() -> Dataset:
    arrays = {}
    for side, lengths in (("chosen", [2, 4]), ("rejected", [3, 1])):
        arrays[f"{side}_ids"] = np.arange(1, 1 + sum(lengths), dtype=np.uint16)
        arrays[f"{side}_response"] = np.ones(sum(lengths), dtype=bool)
        arrays[f"{side}_offsets"] = np.array([0, *np.cumsum(lengths)])
    return dataset(Pairs, arrays, 2)


def test_batch_fields() -> None:
    batch = build_batch(packed(), [4, 2])
    assert isinstance(batch, TokenBatch)
    assert batch.input_ids_BT.tolist() == [[5] * 6, [3] * 6]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 2, 2, 2]] * 2
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    assert batch.loss_mask_BT.tolist() == [[False, True, True, False, False, True]] * 2
    assert batch.sample_ids_B.tolist() == [4, 2]
    assert batch.to("cpu").input_ids_BT.dtype == torch.int64


def test_a_filler_has_no_targets() -> None:
    batch = build_batch(packed(), [3, -1])
    assert isinstance(batch, TokenBatch)
    assert batch.loss_mask_BT[0].any()
    assert not batch.loss_mask_BT[1].any()
    assert batch.sample_ids_B.tolist() == [3, -1]


def test_pairs_are_padded_on_the_right() -> None:
    batch = build_batch(pairs(), [0, 1])
    assert isinstance(batch, PairBatch)
    assert batch.chosen.input_ids_BT.tolist() == [[1, 2, PAD, PAD], [3, 4, 5, 6]]
    assert batch.chosen.attention_mask_BT.sum(1).tolist() == [2, 4]
    assert batch.rejected.input_ids_BT.tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert torch.equal(batch.rejected.response_mask_BT, batch.rejected.attention_mask_BT)


def test_prompts_are_padded_on_the_left() -> None:
    arrays = {"prompt_ids": np.array([1, 2, 3], dtype=np.uint16), "prompt_offsets": np.array([0, 1, 3])}
    batch = build_batch(dataset(Prompts, arrays, 2), [0, 1])
    assert isinstance(batch, PromptBatch)
    assert batch.input_ids_BP.tolist() == [[PAD, 1], [2, 3]]
    assert batch.attention_mask_BP.tolist() == [[False, True], [True, True]]


def taken(data: Dataset, workers: int, micro_batch: int, step: int, seed: int = 5) -> list[int]:
    """Return the samples of a step over all ranks, micro-batch by micro-batch."""
    plans = [BatchPlan(data, seed, 12, workers, rank, micro_batch) for rank in range(workers)]
    batches = [plan.micro_batches(step) for plan in plans]
    assert {len(found) for found in batches} == {plans[0].accumulation}
    return [
        sample
        for number in range(plans[0].accumulation)
        for found in batches
        for sample in found[number].sample_ids_B.tolist()
    ]


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 12), (1, 4), (2, 3), (2, 6), (3, 2), (4, 1), (12, 1)])
def test_samples_of_a_step_do_not_depend_on_the_workers(workers: int, micro_batch: int) -> None:
    data = packed()
    for step in range(8):
        assert taken(data, workers, micro_batch, step) == BatchPlan(data, 5, 12, 1, 0, 1).sample_ids(step)


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 12), (2, 3), (3, 2), (4, 1)])
def test_pairs_of_a_step_do_not_depend_on_the_workers_and_padding_is_small(workers: int, micro_batch: int) -> None:
    lengths = [1 + row % 7 for row in range(24)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.ones(offsets[-1], dtype=np.uint16)
    sides = ("chosen", "rejected")
    arrays = {f"{side}_ids": tokens for side in sides} | {f"{side}_offsets": offsets for side in sides}
    data = dataset(Pairs, arrays | {f"{side}_response": tokens > 0 for side in sides}, 24)
    step = BatchPlan(data, 5, 12, 1, 0, 1).sample_ids(1)
    assert sorted(taken(data, workers, micro_batch, 1)) == sorted(step)
    longest, shortest = max(lengths[row] for row in step), min(lengths[row] for row in step)
    for plan in (BatchPlan(data, 5, 12, workers, rank, micro_batch) for rank in range(workers)):
        dealt = [[lengths[row] for row in batch.sample_ids_B.tolist()] for batch in plan.micro_batches(1)]
        assert sum(max(batch) - min(batch) for batch in dealt) <= longest - shortest


def test_an_epoch_takes_each_row_once_and_batches_run_over_its_end() -> None:
    data = packed(rows=40)
    stream = [sample for step in range(10) for sample in taken(data, 2, 3, step)]
    for epoch in range(3):
        assert sorted(stream[40 * epoch : 40 * epoch + 40]) == list(range(40))
    assert stream[:40] != stream[40:80]


def test_any_step_is_reached_without_the_ones_before() -> None:
    data = packed()
    straight = [BatchPlan(data, 1, 8, 2, 0, 2).sample_ids(step) for step in range(20)]
    for start in range(20):
        resumed = BatchPlan(data, 1, 8, 2, 0, 2)
        assert [resumed.sample_ids(step) for step in range(start, 20)] == straight[start:]
    assert len(BatchPlan(data, 1, 8, 1, 0, 8).sample_ids(10**12)) == 8


@pytest.mark.parametrize(("global_batch", "workers", "micro_batch"), [(10, 4, 1), (12, 2, 4)])
def test_unequal_shares_are_refused(global_batch: int, workers: int, micro_batch: int) -> None:
    with pytest.raises(ValueError, match="no multiple"):
        BatchPlan(packed(), 0, global_batch, workers, 0, micro_batch)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_evaluation_takes_the_same_rows_once_on_any_number_of_workers(workers: int, rows: int) -> None:
    data = packed(rows=40)
    batches = [list(evaluation_batches(data, rows, workers, rank, 4)) for rank in range(workers)]
    assert len({len(found) for found in batches}) == 1
    samples = [sample for found in batches for batch in found for sample in batch.sample_ids_B.tolist() if sample >= 0]
    assert len(samples) == len(set(samples)) == min(rows, 40)
    alone = [
        sample
        for batch in evaluation_batches(data, rows, 1, 0, 1)
        for sample in batch.sample_ids_B.tolist()
        if sample >= 0
    ]
    assert set(samples) == set(alone)
