"""A key-value cache in preallocated buffers.

transformers' DynamicCache copies the keys and values of every layer for each new token. Here a token is written into a
buffer, which grows by half at a time up to the longest response.

B batch, H heads, K cached tokens, L capacity of the buffer in tokens, C head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST_SPARE = 128
"""Tokens by which a buffer grows at least."""


def preallocated_cache(config: Any, max_tokens: int) -> DynamicCache:
    """Return a cache for at most `max_tokens` tokens of a model with this configuration.

    Layers of full attention are preallocated; others (sliding windows, recurrent states) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(max_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_preallocated(cache: DynamicCache) -> bool:
    """Say whether every layer is preallocated, so that rows can be placed in it."""
    return bool(cache.layers) and all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def place_rows(cache: DynamicCache, part: DynamicCache, rows: Tensor, batch: int, length: int) -> None:
    """Write what `part` holds into these of `batch` rows, right-aligned in the first `length` tokens."""
    for layer, read in zip(cache.layers, part.layers, strict=True):
        assert isinstance(layer, PreallocatedLayer)
        layer.place(read.keys, read.values, rows, batch, length)


class PreallocatedLayer(DynamicLayer):
    """A layer whose `keys` and `values`, BHKC, are the filled part of larger buffers, BHLC."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self._max_tokens = max_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with empty buffers."""
        super().lazy_initialization(key_states, value_states)
        self._key_buffer, self._value_buffer = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if stop > self._key_buffer.shape[2]:
            length = self._capacity(stop)
            self._key_buffer = _grown(self._key_buffer[:, :, :start], length)
            self._value_buffer = _grown(self._value_buffer[:, :, :start], length)
        self._key_buffer[:, :, start:stop] = key_states
        self._value_buffer[:, :, start:stop] = value_states
        self._expose(stop)
        return self.keys, self.values

    def place(self, keys_BHKC: Tensor, values_BHKC: Tensor, rows: Tensor, batch: int, length: int) -> None:
        """Write into these of `batch` rows, right-aligned in the first `length` tokens; what nothing wrote is 0."""
        if not self.is_initialized:
            self.lazy_initialization(keys_BHKC, values_BHKC)
            capacity = self._capacity(length)
            self._key_buffer = keys_BHKC.new_zeros(batch, keys_BHKC.shape[1], capacity, keys_BHKC.shape[3])
            self._value_buffer = values_BHKC.new_zeros(batch, values_BHKC.shape[1], capacity, values_BHKC.shape[3])
            self._expose(length)
        start = length - keys_BHKC.shape[2]
        self._key_buffer[rows, :, start:length] = keys_BHKC
        self._value_buffer[rows, :, start:length] = values_BHKC

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        if self.is_initialized:
            self._key_buffer = self._key_buffer.index_select(0, indices)
            self._value_buffer = self._value_buffer.index_select(0, indices)
            self._expose(self.get_seq_length())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every row so many times."""
        if self.is_initialized:
            rows = torch.arange(len(self._key_buffer), device=self._key_buffer.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order."""
        self.batch_select_indices(beam_idx.to(self.device))

    def _capacity(self, length: int) -> int:
        return max(length, min(length + max(length // 2, LEAST_SPARE), self._max_tokens))

    def _expose(self, length: int) -> None:
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]


def _grown(states_BHKC: Tensor, length: int) -> Tensor:
    batch, heads, filled, width = states_BHKC.shape
    buffer = states_BHKC.new_empty(batch, heads, length, width)
    buffer[:, :, :filled] = states_BHKC
    return buffer
