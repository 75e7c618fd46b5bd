"""Batches and which rank takes which rows: the set of samples of a global batch never depends on the workers.

B rows, T tokens, P prompt tokens. Every batch holds `sample_ids_B`: row numbers of the data set, -1 for a filler row that
only keeps ranks in step and has no weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.data.materialise import Dataset


@dataclass(frozen=True)
class TokenBatch:
    """Sequences for language modelling; right-padded, maybe packed."""

    input_ids_BT: Tensor
    segment_ids_BT: Tensor
    """0 at padding, 1, 2, ... per packed piece; attention stays within equal numbers."""
    position_ids_BT: Tensor
    """Counts from 0 in each segment; 0 at padding."""
    loss_mask_BT: Tensor
    """True where the token is a target, predicted from the one before it; never a segment's first token."""
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Copy to a device."""
        raise NotImplementedError


@dataclass(frozen=True)
class SequenceBatch:
    """Whole sequences of prompt and response, right-padded."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """True at real tokens."""
    response_mask_BT: Tensor
    """True at the response's tokens, the end token included."""

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """Copy to a device."""
        raise NotImplementedError


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs; row b of both sides has the same prompt."""

    chosen: SequenceBatch
    rejected: SequenceBatch
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "PairBatch":
        """Copy to a device."""
        raise NotImplementedError


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to continue, left-padded."""

    input_ids_BP: Tensor
    attention_mask_BP: Tensor
    """True at real tokens."""
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "PromptBatch":
        """Copy to a device."""
        raise NotImplementedError


Batch = TokenBatch | PairBatch | PromptBatch


def build_batch(dataset: Dataset, rows: list[int]) -> Batch:
    """Build the batch of these rows in the form of the data set: TokenBatch, PairBatch or PromptBatch; -1 is a filler."""
    raise NotImplementedError


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one rank. Global position `step * global_batch + j` holds row `global_sample(digest, seed, position)`;
    each rank takes `global_batch / workers` neighbouring positions, in micro-batches of at most `micro_batch` rows,
    equally many on every rank."""

    dataset: Dataset
    seed: int
    global_batch: int
    workers: int
    rank: int
    micro_batch: int

    def sample_ids(self, step: int) -> list[int]:
        """Return the rows of the whole global batch, in position order."""
        raise NotImplementedError

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step (from 0)."""
        raise NotImplementedError


def evaluation_batches(dataset: Dataset, rows: int, workers: int, rank: int, micro_batch: int) -> Iterator[Batch]:
    """Yield this rank's share of at most `rows` rows, always the same ones; equally many batches on every rank by fillers."""
    raise NotImplementedError
