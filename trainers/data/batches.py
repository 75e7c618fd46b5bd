"""Batches and which rank takes which rows: the set of samples of a global batch never depends on the workers.

B rows, T tokens, P prompt tokens. Every batch holds `sample_ids_B`: row numbers of the data set, -1 for a filler row
that only keeps ranks in step and has no weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from trainers.data.dataset import Dataset
from trainers.data.mixed_order import RowOrder
from trainers.data.mixture import Draw
from trainers.data.order import deal_by_length, global_sample
from trainers.runtime.randomness import stream_seeds

FILLER = -1
AFTER_WARM_UP = 2**31
"""The step of batches of evaluations."""


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
        return TokenBatch(**{name: value.to(device) for name, value in vars(self).items()})


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
        return SequenceBatch(**{name: value.to(device) for name, value in vars(self).items()})


def joined_sequences(*parts: SequenceBatch) -> SequenceBatch:
    """Return the rows of all parts, padded to the longest."""
    width = max(part.input_ids_BT.shape[1] for part in parts)
    widened = [
        {name: nn.functional.pad(value, (0, width - value.shape[1])) for name, value in vars(part).items()}
        for part in parts
    ]
    return SequenceBatch(**{name: torch.cat([part[name] for part in widened]) for name in widened[0]})


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs; row b of both sides has the same prompt."""

    chosen: SequenceBatch
    rejected: SequenceBatch
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "PairBatch":
        """Copy to a device."""
        return PairBatch(self.chosen.to(device), self.rejected.to(device), self.sample_ids_B.to(device))

    def joined(self) -> SequenceBatch:
        """Return the chosen answers, then the rejected ones, as one batch [2 B, T]."""
        return joined_sequences(self.chosen, self.rejected)


@dataclass(frozen=True)
class JudgedBatch:
    """Answers with a verdict; row b of both has the same prompt."""

    answers: SequenceBatch
    mismatched: SequenceBatch
    """Answers to other prompts."""
    is_desirable_B: Tensor
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "JudgedBatch":
        """Copy to a device."""
        return JudgedBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def joined(self) -> SequenceBatch:
        """Return the answers, then the mismatched ones, as one batch [2 B, T]."""
        return joined_sequences(self.answers, self.mismatched)


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Sources and their targets, both right-padded and ended by the end token."""

    source_ids_BS: Tensor
    source_mask_BS: Tensor
    """True at real tokens."""
    target_ids_BT: Tensor
    target_mask_BT: Tensor
    """True at the tokens to write; nowhere in a filler row."""
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "Seq2SeqBatch":
        """Copy to a device."""
        return Seq2SeqBatch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to continue, left-padded."""

    input_ids_BP: Tensor
    attention_mask_BP: Tensor
    """True at real tokens."""
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "PromptBatch":
        """Copy to a device."""
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Texts:
    """Padded texts."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """True at real tokens."""

    def to(self, device: torch.device | str) -> "Texts":
        """Copy to a device."""
        return Texts(self.input_ids_BT.to(device), self.attention_mask_BT.to(device))


@dataclass(frozen=True)
class LabelledBatch:
    """Texts with their classes, and maybe two views of others: as they are, and with words hidden."""

    texts: Texts
    labels_B: Tensor
    """Numbers of the classes; -1 at fillers."""
    sample_ids_B: Tensor
    unlabelled: Texts | None = None
    augmented: Texts | None = None

    def to(self, device: torch.device | str) -> "LabelledBatch":
        """Copy to a device."""
        return replace(
            self,
            texts=self.texts.to(device),
            labels_B=self.labels_B.to(device),
            unlabelled=None if self.unlabelled is None else self.unlabelled.to(device),
            augmented=None if self.augmented is None else self.augmented.to(device),
        )


@dataclass(frozen=True)
class ImageBatch:
    """Images with values in [0, 1]; noise is drawn from a seed per sample, so no rank or micro-batch changes it."""

    images_BCHW: Tensor
    labels_B: Tensor
    """Class numbers; -1 where the data has no labels."""
    noise_seeds_B: Tensor
    """Keyed by the sample's global position; in evaluations by its row, the same every time."""
    sample_ids_B: Tensor
    step: int = AFTER_WARM_UP
    """Optimiser step from 0 that the batch belongs to; in evaluations every warm-up is over."""
    captions: Texts | None = None
    """Tokens of the images' captions, where the stage reads them."""

    def to(self, device: torch.device | str) -> "ImageBatch":
        """Copy to a device; the noise seeds stay, noise is drawn on the CPU."""
        return replace(
            self,
            images_BCHW=self.images_BCHW.to(device),
            labels_B=self.labels_B.to(device),
            sample_ids_B=self.sample_ids_B.to(device),
            captions=None if self.captions is None else self.captions.to(device),
        )


@dataclass(frozen=True)
class ImageTextBatch:
    """Sequences with images, whose image tokens stand in the order of the images."""

    tokens: TokenBatch
    images: Mapping[str, Tensor]
    """What the model takes of them, by the names of its arguments."""
    has_images: bool = True
    """False: none of the sequences has one; `images` are those of another image then."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Rows of the data set."""
        return self.tokens.sample_ids_B

    def to(self, device: torch.device | str) -> "ImageTextBatch":
        """Copy to a device."""
        images = {name: value.to(device) for name, value in self.images.items()}
        return ImageTextBatch(self.tokens.to(device), images, self.has_images)


Batch = TokenBatch | ImageTextBatch | LabelledBatch | Seq2SeqBatch | PairBatch | JudgedBatch | PromptBatch | ImageBatch


def build_batch(dataset: Dataset, rows: Sequence[int]) -> Batch:
    """Build the batch of these rows as the set's layout does.

    Rows of -1 are fillers: they hold what row 0 does, without any target. Padding goes to the longest row.
    """
    batch: Batch = dataset.layout.collate(dataset, rows)
    return batch


def sequence_batch(ids: Sequence[np.ndarray], response: Sequence[np.ndarray], pad_id: int) -> SequenceBatch:
    """Pad sequences of prompt and response."""
    texts = pad_texts(ids, pad_id)
    response_mask, _ = pad([np.asarray(row) for row in response], False)
    return SequenceBatch(texts.input_ids_BT, texts.attention_mask_BT, torch.from_numpy(response_mask))


def build_seq2seq_batch(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], pad_id: int, samples: Tensor
) -> Seq2SeqBatch:
    """Pad sources and targets; rows whose sample is -1 have nothing to write."""
    source_ids, source_mask = pad([ids.astype(np.int64) for ids in sources], pad_id)
    target_ids, target_mask = pad([ids.astype(np.int64) for ids in targets], pad_id)
    return Seq2SeqBatch(
        torch.from_numpy(source_ids),
        torch.from_numpy(source_mask),
        torch.from_numpy(target_ids),
        torch.from_numpy(target_mask & (samples.numpy() != FILLER)[:, None]),
        samples,
    )


def sample_ids(rows: Sequence[int]) -> Tensor:
    """Return row numbers as batches hold them."""
    return torch.tensor(list(rows), dtype=torch.int64)


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one rank.

    Global position `step * global_batch + j` holds the row that the set's order has there. Micro-batch m of rank r
    takes neighbouring positions: the m-th run of `workers * micro_batch` positions, in it the r-th run of
    `micro_batch`; pairs, sources and targets are dealt by length instead.
    `workers * micro_batch` must divide `global_batch`.
    """

    dataset: Dataset
    seed: int
    global_batch: int
    workers: int
    rank: int
    micro_batch: int
    by_length: bool = False
    """Whether sequences are dealt by length too."""

    def __post_init__(self) -> None:
        """Demand equal shares."""
        if self.global_batch % (self.workers * self.micro_batch):
            raise ValueError(
                f"global batch {self.global_batch} is no multiple of "
                f"{self.workers} workers x micro-batch {self.micro_batch}"
            )
        if not 0 <= self.rank < self.workers:
            raise ValueError(f"rank {self.rank} of {self.workers} workers")

    @cached_property
    def order(self) -> RowOrder:
        """The row of each position."""
        return self.dataset.order(self.seed)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch // (self.workers * self.micro_batch)

    def sample_ids(self, step: int) -> list[int]:
        """Return the rows of the whole global batch, in position order."""
        first = step * self.global_batch
        return [self.order.row(first + offset) for offset in range(self.global_batch)]

    def drawn(self, steps: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture in so many steps."""
        return self.dataset.drawn(self.order, steps * self.global_batch)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step (from 0)."""
        rows = self.sample_ids(step)
        stride = self.workers * self.micro_batch
        starts = range(self.rank * self.micro_batch, self.global_batch, stride)
        shares: Sequence[Sequence[int]] = [range(start, start + self.micro_batch) for start in starts]
        if self.by_length or self.dataset.layout.sides:
            lengths = self.dataset.lengths(rows)
            shares = deal_by_length(range(len(rows)), lengths, self.rank, self.workers, self.micro_batch)
        return [self._batch([rows[place] for place in share], share, step) for share in shares]

    def _batch(self, rows: Sequence[int], places: Sequence[int], step: int) -> Batch:
        """Build a batch whose noise, where it has any, follows from the places in the global batch."""
        batch = build_batch(self.dataset, rows)
        if not isinstance(batch, ImageBatch):
            return batch
        first = step * self.global_batch
        seeds = stream_seeds(self.seed, "noise", (first + place for place in places))
        return replace(batch, noise_seeds_B=torch.tensor(seeds, dtype=torch.int64), step=step)


def evaluation_batches(
    dataset: Dataset, rows: int, workers: int, rank: int, micro_batch: int, among: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield this rank's share of at most `rows` rows, the same ones every time, in an order drawn once from the digest.

    `among`: the rows that may be taken; None: all of them. Fillers make the batches equally many and equally large on
    every rank.
    """
    taken = range(len(dataset)) if among is None else among
    count = min(rows, len(taken))
    stride = workers * micro_batch
    for start in range(rank * micro_batch, -(-count // stride) * stride, stride):
        positions = range(start, start + micro_batch)
        places = [global_sample(dataset.digest, 0, position, len(taken)) for position in positions if position < count]
        sampled = [taken[place] for place in places]
        yield build_batch(dataset, sampled + [FILLER] * (micro_batch - len(sampled)))


def pad_texts(rows: Sequence[np.ndarray], pad_id: int, *, left: bool = False) -> Texts:
    """Pad token ids to the longest row, on the right or the left."""
    ids, mask = pad([row.astype(np.int64) for row in rows], pad_id, left=left)
    return Texts(torch.from_numpy(ids), torch.from_numpy(mask))


def pad(rows: Sequence[np.ndarray], value: int | bool, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows to the longest; returns (padded [B, T], mask [B, T] that is True at real items)."""
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, dtype=rows[0].dtype)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        padded[number, place] = row
        mask[number, place] = True
    return padded, mask


def token_batch(dataset: Dataset, rows: Sequence[int]) -> TokenBatch:
    """Build the batch of packed sequences."""
    taken, samples = [max(row, 0) for row in rows], sample_ids(rows)
    segments = dataset.arrays["segment_ids"][taken].astype(np.int64)
    longest = int((segments > 0).sum(axis=1).max())
    segments = segments[:, :longest]
    loss_mask = dataset.arrays["loss_mask"][taken][:, :longest] & (samples.numpy() != FILLER)[:, None]
    return TokenBatch(
        input_ids_BT=torch.from_numpy(dataset.arrays["input_ids"][taken][:, :longest].astype(np.int64)),
        segment_ids_BT=torch.from_numpy(segments),
        position_ids_BT=torch.from_numpy(_positions(segments)),
        loss_mask_BT=torch.from_numpy(loss_mask),
        sample_ids_B=samples,
    )


def _positions(segments: np.ndarray) -> np.ndarray:
    """Count from 0 in each segment; 0 at padding."""
    index = np.arange(segments.shape[1])
    is_first = np.ones_like(segments, dtype=bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.maximum.accumulate(np.where(is_first, index, 0), axis=1)
    return np.where(segments > 0, index - starts, 0)
