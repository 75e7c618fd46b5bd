"""Text as a stream for recurrent models: lanes that are read on from step to step, and the state that each carries.

The stream is cut into as many lanes as a global batch has rows; step by step each lane advances by `sequence_length`
tokens, and its state with it: truncated backpropagation through time (Williams & Peng 1990). When the lanes end, an
epoch does: the stream is turned by a keyed amount, and every state starts from zero. B lanes of a micro-batch, T
tokens; a state has the shape [S, L, B, H] of `trainers.models.rnn`.

Held-out text is read the same way, once: `HeldOutStream`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recipes.errors import RequestError
from trainers.checkpoint.loop_state import SourceState
from trainers.data.dataset import Dataset
from trainers.data.mixture import Draw
from trainers.runtime import distributed
from trainers.runtime.randomness import stream_seed

CARRIED = "carried"
HELD_OUT_LANES = 16
"""Most lanes of a held-out stream."""
LEAST_LANE = 512
"""Fewest targets of a lane of a held-out stream that has several: each lane starts from nothing."""


@dataclass(frozen=True)
class StreamBatch:
    """Neighbouring tokens of some lanes."""

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    """The token after each."""
    loss_mask_BT: Tensor
    """True where the target counts: everywhere but at a document's first token."""
    lanes_B: Tensor
    """Numbers of the lanes in the global batch."""
    sample_ids_B: Tensor
    """Place in the stream in sequences."""
    states: "LaneStates"

    def to(self, device: torch.device | str) -> "StreamBatch":
        """Copy to a device; the states stay where the model is."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            target_ids_BT=self.target_ids_BT.to(device),
            loss_mask_BT=self.loss_mask_BT.to(device),
        )


class LaneStates:
    """The state that each lane carries; a rank keeps those of the lanes that it reads."""

    def __init__(self, zero_SLBH: Tensor) -> None:
        self._states = zero_SLBH.clone()

    def read(self, lanes_B: Tensor) -> Tensor:
        """Return the states of some lanes."""
        return self._states[:, :, lanes_B.to(self._states.device)]

    def write(self, lanes_B: Tensor, states_SLBH: Tensor) -> None:
        """Keep the states after a step; one that is not finite starts again from zero."""
        is_finite_B = torch.isfinite(states_SLBH).all(dim=3).all(dim=1).all(dim=0)
        kept = torch.where(is_finite_B[None, None, :, None], states_SLBH, torch.zeros_like(states_SLBH))
        self._states[:, :, lanes_B.to(self._states.device)] = kept

    def reset(self) -> None:
        """Start every lane from zero."""
        self._states.zero_()

    def collected(self, own_lanes: Tensor) -> Tensor:
        """Return all lanes' states in fp32 on the CPU, equal on every rank; collective."""
        whole = torch.zeros(self._states.shape)
        whole[:, :, own_lanes] = self._states[:, :, own_lanes.to(self._states.device)].float().cpu()
        return distributed.sum_tensor(whole)

    def load(self, states_SLBH: Tensor) -> None:
        """Take over what `collected` gave; raises RequestError for another shape."""
        if states_SLBH.shape != self._states.shape:
            raise RequestError(
                f"the saved carried state has shape {tuple(states_SLBH.shape)}, the model's {tuple(self._states.shape)}"
            )
        self._states.copy_(states_SLBH)


class StreamBatches:
    """Batch source over a stream; what it remembers is the lanes' states.

    Lane j of the global batch goes to the rank that takes position j of a `BatchPlan`.
    """

    def __init__(
        self,
        dataset: Dataset,
        states: LaneStates,
        *,
        seed: int,
        sequence_length: int,
        global_batch: int,
        workers: int,
        rank: int,
        micro_batch: int,
        steps_planned: int,
    ) -> None:
        """Raise RequestError for a text that is shorter than one step."""
        self._tokens = np.asarray(dataset.arrays["tokens"])
        self._is_first = np.asarray(dataset.arrays["is_first"])
        self._length, self._lanes, self._seed, self._states = sequence_length, global_batch, seed, states
        self._chunks = (len(self._tokens) - 1) // (global_batch * sequence_length)
        if self._chunks == 0:
            raise RequestError(
                f"the text has {len(self._tokens)} tokens, fewer than global_batch x sequence_length + 1 "
                f"({global_batch} x {sequence_length} + 1); lower one of them"
            )
        starts = range(rank * micro_batch, global_batch, workers * micro_batch)
        self._runs = [torch.arange(start, start + micro_batch) for start in starts]
        self.steps_planned = steps_planned

    def micro_batches(self, step: int) -> list[StreamBatch]:
        """Return this rank's next tokens of its lanes."""
        epoch, chunk = divmod(step, self._chunks)
        if chunk == 0:
            self._states.reset()
        turn = stream_seed(self._seed, "stream", epoch) % len(self._tokens)
        return [self._batch(lanes, turn, chunk) for lanes in self._runs]

    def drawn(self, steps_done: int) -> dict[str, Draw]:
        """Nothing is counted: a lane reads what comes."""
        return {}

    def can_save(self, steps_done: int) -> bool:
        """Always: the states are those after the last step."""
        return True

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Never stops early."""
        return None

    def state(self) -> SourceState:
        """Give every lane's state; collective."""
        return SourceState(tensors={CARRIED: self._states.collected(torch.cat(self._runs))})

    def load_state(self, state: SourceState) -> None:
        """Take the lanes' states over, from any number of ranks."""
        self._states.load(state.tensors[CARRIED])

    def _batch(self, lanes: Tensor, turn: int, chunk: int) -> StreamBatch:
        starts = turn + (lanes.numpy() * self._chunks + chunk) * self._length
        places = (starts[:, None] + np.arange(self._length + 1)) % len(self._tokens)
        tokens = torch.from_numpy(self._tokens[places].astype(np.int64))
        return StreamBatch(
            input_ids_BT=tokens[:, :-1],
            target_ids_BT=tokens[:, 1:],
            loss_mask_BT=torch.from_numpy(~self._is_first[places[:, 1:]]),
            lanes_B=lanes,
            sample_ids_B=torch.from_numpy(places[:, 0] // self._length),
            states=self._states,
        )


def beginning(dataset: Dataset, sequences: int, length: int) -> Dataset:
    """Return a stream's first `sequences` of `length` tokens, and the target after them."""
    kept = sequences * length + 1
    return replace(dataset, arrays={name: array[:kept] for name, array in dataset.arrays.items()})


class HeldOutStream:
    """The batches in which a stream of N tokens is read once, from its first to its last, with the state carried on.

    Its N - 1 targets are cut into min(16, (N - 1) // 512) lanes of neighbours (one at least), equal but for the last;
    every lane starts from a zero state and advances by `length` tokens a batch. So the loss depends on the text alone,
    not on the workers, nor (but for rounding) on `length`. Rank r of W takes the r-th run of lanes; lanes past the last
    one are empty and keep the ranks in step.
    """

    def __init__(
        self, dataset: Dataset, zero_state: Callable[[int], Tensor], *, length: int, workers: int, rank: int
    ) -> None:
        """`zero_state` gives the state of so many rows, on the model's device."""
        self._tokens = np.asarray(dataset.arrays["tokens"])
        self._is_first = np.asarray(dataset.arrays["is_first"])
        self._length, self._zero_state = length, zero_state
        targets = len(self._tokens) - 1
        lanes = max(1, min(HELD_OUT_LANES, targets // LEAST_LANE))
        self._lane = -(-targets // lanes)
        share = -(-lanes // workers)
        self._starts = np.arange(rank * share, (rank + 1) * share) * self._lane

    def __iter__(self) -> Iterator[StreamBatch]:
        """Yield this rank's batches; each is to be run before the next is taken, which continues from its state."""
        rows = len(self._starts)
        states = LaneStates(self._zero_state(rows))
        last = len(self._tokens) - 1
        for done in range(0, self._lane, self._length):
            offsets = np.arange(done, min(done + self._length, self._lane))
            places = self._starts[:, None] + offsets
            is_read = places < last
            places = np.minimum(places, last - 1)
            yield StreamBatch(
                input_ids_BT=torch.from_numpy(self._tokens[places].astype(np.int64)),
                target_ids_BT=torch.from_numpy(self._tokens[places + 1].astype(np.int64)),
                loss_mask_BT=torch.from_numpy(is_read & ~self._is_first[places + 1]),
                lanes_B=torch.arange(rows),
                sample_ids_B=torch.from_numpy(places[:, 0] // self._length),
                states=states,
            )
