"""Rows that begin alike, such as responses to one prompt: what they have in common is read once.

Whatever treats tokens one by one (projections, norms, MLPs: nearly all of a model) is given each token once. Attention
has the rows as they are, by any kernel: that repeats the queries of what is shared, and needs no mask.

B rows, T tokens of a row, N tokens that are read, H heads, C and D widths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Attention = Callable[..., tuple[Tensor, Any]]
"""As transformers calls it: of a module, queries, keys and values BHTC, a mask, and named arguments; gives BTHC."""
WORTHWHILE = 0.9
"""Rows are read as they are where more than this share of their tokens would be read."""


@dataclass(frozen=True)
class SharedRows:
    """Right-padded rows without gaps, and where their tokens are among those that are read."""

    places_BT: Tensor
    """Of each token among those that are read; padding points at the first."""
    chosen_N: Tensor
    """Of each token that is read, its place in the rows laid end to end."""

    @staticmethod
    def of(input_ids_BT: Tensor, real_BT: Tensor, own_BT: Tensor) -> "SharedRows | None":
        """Share what precedes the first True of `own_BT` between rows in which it is equal; None: that gains little."""
        device, (count, width) = input_ids_BT.device, input_ids_BT.shape
        rows, lengths = input_ids_BT.tolist(), real_BT.sum(dim=1).tolist()
        starts = own_BT.int().argmax(dim=1).tolist()
        places = torch.zeros(count, width, dtype=torch.int64)
        chosen: list[Tensor] = []
        known: dict[tuple[int, ...], int] = {}
        total = 0

        def read(row: int, start: int, stop: int) -> None:
            nonlocal total
            places[row, start:stop] = torch.arange(total, total + stop - start)
            chosen.append(torch.arange(row * width + start, row * width + stop))
            total += stop - start

        for row, (ids, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
            first = known.setdefault(tuple(ids[:start]), row)
            if first == row:
                read(row, 0, start)
            places[row, :start] = places[first, :start]
            read(row, start, length)
        if total > WORTHWHILE * sum(lengths):
            return None
        return SharedRows(places.to(device), torch.cat(chosen).to(device))

    def inputs(self, input_ids_BT: Tensor) -> dict[str, Any]:
        """What a backbone is told: the tokens as one row, their positions, and this for its attention."""
        positions_N = self.chosen_N % input_ids_BT.shape[1]
        no_mask = torch.zeros(1, 1, 1, 1, device=input_ids_BT.device)  # of four dimensions: passed on as it is
        ids_1N = input_ids_BT.reshape(-1)[self.chosen_N][None]
        return {"input_ids": ids_1N, "position_ids": positions_N[None], "attention_mask": no_mask, "shared_rows": self}

    def spread(self, states_1ND: Tensor) -> Tensor:
        """States BTD of the rows from those of the tokens that were read."""
        return picked(states_1ND[0], self.places_BT.reshape(-1)).view(*self.places_BT.shape, -1)

    def attend(
        self, kernel: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **named: Any
    ) -> tuple[Tensor, None]:
        """Attention of the rows from what was read, queries, keys and values 1HNC; gives 1NHC of what was read."""
        rows = (
            self.spread(states.transpose(1, 2).flatten(2)).unflatten(2, (states.shape[1], -1)).transpose(1, 2)
            for states in (query, key, value)
        )
        output_BTHC, _ = kernel(module, *rows, None, **named)
        return output_BTHC.flatten(0, 1).index_select(0, self.chosen_N)[None], None


def picked(rows: Tensor, index: Tensor) -> Tensor:
    """Rows by number; on GPUs in a way whose gradient adds up in one order."""
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def over_shared_rows(kernel: Attention) -> Attention:
    """The kernel, which also attends for a model that is given `shared_rows`."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *,
        shared_rows: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Any]:
        given = (module, query, key, value, attention_mask)
        return kernel(*given, **named) if shared_rows is None else shared_rows.attend(kernel, *given, **named)

    return attend


class AttentionCount:
    """Counts the layers whose attention is told of shared rows."""

    def __init__(self) -> None:
        self.count = 0

    def attend(
        self, kernel: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **named: Any
    ) -> tuple[Tensor, Any]:
        """Attend as without shared rows."""
        self.count += 1
        return kernel(module, query, key, value, None, **named)
