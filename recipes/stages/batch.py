"""What the workers of a stage share in a step: sizes, micro-batches, and the rules that they keep (pure)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from recipes.errors import FieldFinding, at
from recipes.problem_codes import Code

MAX_AUTO_MICRO_BATCH = 16
"""The largest micro-batch that `auto` takes, but for images."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What the workers share in an optimiser step, or in an iteration of rollouts."""

    field_path: str
    """The field that gives the size."""
    written: int
    """Its value: sequences, pairs, images or prompts."""
    samples: int = 1
    """Responses to each prompt."""
    mini_batches: int = 1
    """Optimiser steps that an iteration is divided into."""
    text: int = 0
    """Sequences of text that are mixed into a step."""
    noun: str = ""
    """What an iteration has that many of; empty: they are a step's."""

    @property
    def size(self) -> int:
        """Samples of an optimiser step over all workers."""
        return self.written * self.samples // self.mini_batches

    def divides(self, workers: int) -> bool:
        """Whether the workers can share an iteration and each of its steps evenly."""
        return not any(number % workers for number in (self.written, self.text, self.size))

    def unit(self, workers: int) -> int:
        """What `written` must be a multiple of for that."""
        shares = self.mini_batches * workers
        return math.lcm(workers, shares // math.gcd(shares, self.samples))

    def rules(self, workers: int | Literal["auto"], min_workers: int = 1) -> Iterator[FieldFinding]:
        """The first reason why the workers cannot share it evenly; `auto`: why no number of them can."""
        shares = 1 if workers == "auto" else workers
        fitting = _near_multiple(self.written, self.unit(shares))
        code = Code.BATCH_NOT_DIVISIBLE
        if self.noun and self.written % shares:
            message = f"the {self.noun} of an iteration cannot be divided among {workers} workers"
            yield at(self.field_path, self.written, code, message, fitting)
        elif self.written * self.samples % self.mini_batches:
            remainder = self.written * self.samples % self.mini_batches
            message = f"{self._iteration} must divide into mini_batches ({self.mini_batches}); remainder {remainder}"
            suggestion = _near_divisor(self.written * self.samples // shares, self.mini_batches)
            yield at("algorithm.mini_batches", self.mini_batches, code, message, suggestion)
        elif self.text % shares:
            message = f"the text of a step cannot be divided among {workers} workers"
            yield at("algorithm.text_batch", self.text, code, message, _near_multiple(self.text, shares))
        elif self.size % shares:
            message = (
                f"the batch ({self.size}) cannot be divided among {workers} workers; remainder {self.size % shares}"
            )
            yield at(self.field_path, self.written, code, message, fitting)
        elif workers == "auto" and not any(map(self.divides, range(min_workers, self.size + 1))):
            message = f"no number of workers from min_workers ({min_workers}) on divides the batch ({self.size})"
            yield at(self.field_path, self.size, code, message)

    @property
    def _iteration(self) -> str:
        """What an iteration has, in words."""
        key = self.field_path.rpartition(".")[2]
        if self.samples == 1:
            return f"{key} ({self.written})"
        product = f"{self.written} x {self.samples} = {self.written * self.samples}"
        return f"{key} x samples_per_prompt ({product})"


def micro_batches(
    global_batch: int, workers: int, micro_batch: int | str = "auto", *, at_most: int = MAX_AUTO_MICRO_BATCH
) -> tuple[int, int]:
    """Micro-batch and accumulation so that workers x micro-batch x accumulation = global batch; raises ValueError."""
    if global_batch % workers:
        raise ValueError(f"global_batch ({global_batch}) cannot be divided among {workers} workers")
    share = global_batch // workers
    if micro_batch == "auto":
        micro = max(size for size in range(1, min(share, at_most) + 1) if share % size == 0)
    else:
        micro = int(micro_batch)
        if share % micro:
            raise ValueError(
                f"micro_batch ({micro}) must divide each worker's share of the batch "
                f"({global_batch} / {workers} = {share})"
            )
    return micro, share // micro


def _near_multiple(value: int, of: int) -> str:
    low, high = value // of * of, -(-value // of) * of
    return f"for example {high}" if low == 0 else f"for example {low} or {high}"


def _near_divisor(total: int, wanted: int) -> str:
    fitting = [count for count in range(1, min(total, 4096) + 1) if total % count == 0]
    return f"for example {min(fitting, key=lambda count: (abs(count - wanted), count))}"
