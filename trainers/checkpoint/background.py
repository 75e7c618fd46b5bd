"""Saving beside training: a copy of the state in one reused host buffer, and one task at a time that writes it."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.store.state import Piece

ALIGNMENT = 64
BACKGROUND_NICENESS = 15
"""Against a busy thread of ordinary priority weight 36 to 1,024 (Linux's sched_prio_to_weight); alone, a whole core."""


@dataclass(frozen=True)
class HeldPiece:
    """A copy of a piece of a state, in the host buffer."""

    group: str
    name: str
    shape: Sequence[int]
    start: int
    values: Tensor


class HostBuffer:
    """Memory for one copy of this rank's share of a state: taken at the first save and used again by all others.

    It grows only when the state does. Pinned where the state lies on a GPU.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Size of the memory that is held."""
        return self._buffer.numel()

    def copy(self, pieces: Iterable[Piece]) -> list[HeldPiece]:
        """Copy pieces; what an earlier call returned is overwritten."""
        sources = list(pieces)
        starts, total, is_pinned = [], 0, False
        for piece in sources:
            starts.append(total)
            size = piece.values.numel() * piece.values.element_size()
            total += -(-size // ALIGNMENT) * ALIGNMENT
            is_pinned = is_pinned or piece.values.is_cuda
        if total > self._buffer.numel():
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=is_pinned)
        held = []
        for piece, start in zip(sources, starts, strict=True):
            size = piece.values.numel() * piece.values.element_size()
            copy = self._buffer[start : start + size].view(piece.values.dtype)
            copy.copy_(piece.values.detach().reshape(-1), non_blocking=True)
            held.append(HeldPiece(piece.group, piece.name, tuple(piece.shape), piece.start, copy))
        if is_pinned:
            torch.cuda.synchronize()
        return held


def yield_processor() -> None:
    """Let this thread, and those that it starts, have little of a processor that others want: a step must not slow."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        thread = threading.get_native_id()
        present = os.getpriority(os.PRIO_PROCESS, thread)
        with suppress(PermissionError):  # a sandbox may forbid even this; then a save takes its share
            os.setpriority(os.PRIO_PROCESS, thread, max(present, BACKGROUND_NICENESS))


class BackgroundTask:
    """Runs at most one task at a time in a thread; its error is raised by whoever asks next."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether a task is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], None]) -> None:
        """Start a task once the one before has ended; raises the error of that one."""
        self.wait()

        def run() -> None:
            try:
                yield_processor()
                task()
            except BaseException as error:  # the thread's outermost call: raised again by `check` or `wait`
                self._error = error

        # A daemon: a process that fails in training does not wait for a save, which a reader never sees half.
        self._thread = threading.Thread(target=run, name="save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a task that has failed; never waits."""
        if not self.is_running:
            self.wait()

    def wait(self) -> None:
        """Wait for the task, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
