"""What models remember of the rows that they continue: keys and values, a recurrent state, or nothing.

B batch, P prompt tokens, K cached tokens, V vocabulary, D width.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from trainers.models.encoder_decoder import decode, encode, start_token
from trainers.models.forward_forms import has_windows, image_arguments, record_of
from trainers.models.token_losses import is_recurrent

LENGTH_STEP = 16
"""Prompts whose padding differs by fewer tokens are read together."""

GROUP_TOKENS = 1024
"""Tokens that are worth a forward: fewer of similar prompts are read with longer ones."""


class Continuation(Protocol):
    """What a model remembers of the rows that it continues."""

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the left-padded prompts; returns the hidden states [B, D] to predict their next tokens from."""

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Read one more token of every row; returns the hidden states [B, D] after it."""

    def keep(self, rows: Tensor) -> None:
        """Continue these rows alone; one that is named several times is continued in several ways."""


def continuation_of(model: Any, max_new_tokens: int, images: Mapping[str, Tensor]) -> Continuation:
    """Return what a model of its kind remembers."""
    if model.config.is_encoder_decoder:
        return TargetCache(model, max_new_tokens)
    if is_recurrent(model):
        return RecurrentState(model)
    form = record_of(model).decoding
    if form == "positions":
        return PositionedCache(model, max_new_tokens, images)
    if images:
        return KeyValueCache(model, max_new_tokens, images)
    match "mask" if form == "bias" and has_windows(model) else form:
        case "mask":
            return MaskedCache(model, max_new_tokens)
        case "no_cache":
            return UncachedTokens(model)
    return KeyValueCache(model, max_new_tokens)


def _last_state(
    model: Any, cache: Any, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, **images: Tensor
) -> Tensor:
    """Read tokens after those in the cache, and into it; the hidden states [B, D] of the last ones."""
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        **images,
    )
    last: Tensor = output.last_hidden_state[:, -1]
    return last


class KeyValueCache:
    """Keys and values of a causal transformer; the prompts' images are read with them."""

    def __init__(self, model: Any, max_new_tokens: int, images: Mapping[str, Tensor] | None = None) -> None:
        self._model = model
        self._images = images or {}
        self._max_new_tokens = max_new_tokens

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the prompts; padding sees itself alone."""
        from trainers.inference.key_values import is_preallocated, place_rows, preallocated_cache

        rows, length = prompt_ids_BP.shape
        config = self._model.config
        self._cache = preallocated_cache(config, length + self._max_new_tokens)
        self._positions_B1 = prompt_mask_BP.sum(1, keepdim=True) - 1
        self._bias_B11K: Tensor | None = None
        if not bool(prompt_mask_BP.all()):
            seen_BK = torch.nn.functional.pad(prompt_mask_BP, (0, self._max_new_tokens), value=True)
            self._bias_B11K = _additive(seen_BK[:, None, None], self._model.dtype)
        groups = [] if self._images or not is_preallocated(self._cache) else length_groups(prompt_mask_BP)
        if len(groups) <= 1:
            return self._read(self._cache, prompt_ids_BP, prompt_mask_BP)
        states = []
        for members, longest in groups:
            part = preallocated_cache(config, longest)
            states.append(self._read(part, prompt_ids_BP[members, -longest:], prompt_mask_BP[members, -longest:]))
            place_rows(self._cache, part, members, rows, length)
        order = torch.cat([members for members, _ in groups]).argsort()
        return torch.cat(states)[order]

    def _read(self, cache: Any, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        positions = (mask_BP.long().cumsum(1) - 1).clamp_(min=0)
        images = image_arguments(self._model, ids_BP, self._images)
        return _last_state(self._model, cache, ids_BP, prompt_bias(mask_BP, self._model.dtype), positions, **images)

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a position."""
        self._positions_B1 = self._positions_B1 + 1
        bias = None if self._bias_B11K is None else self._bias_B11K[..., : self._cache.get_seq_length() + 1]
        return _last_state(self._model, self._cache, tokens_B[:, None], bias, self._positions_B1)

    def keep(self, rows: Tensor) -> None:
        """Select in the cache."""
        self._cache.batch_select_indices(rows)
        self._positions_B1 = self._positions_B1[rows]
        self._bias_B11K = None if self._bias_B11K is None else self._bias_B11K[rows]


class MaskedCache:
    """Keys and values of a causal transformer that builds its own masks, such as sliding windows, from the padding."""

    def __init__(self, model: Any, max_new_tokens: int) -> None:
        self._model = model
        self._max_new_tokens = max_new_tokens

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the prompts."""
        from trainers.inference.key_values import preallocated_cache

        self._cache = preallocated_cache(self._model.config, prompt_ids_BP.shape[1] + self._max_new_tokens)
        self._mask_BK = prompt_mask_BP.long()
        return self._forward(prompt_ids_BP, (self._mask_BK.cumsum(1) - 1).clamp_(min=0))

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a position."""
        self._mask_BK = torch.nn.functional.pad(self._mask_BK, (0, 1), value=1)
        return self._forward(tokens_B[:, None], self._mask_BK.sum(1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        """Select in the cache."""
        self._cache.batch_select_indices(rows)
        self._mask_BK = self._mask_BK[rows]

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return _last_state(self._model, self._cache, input_ids, self._mask_BK, position_ids)


class PositionedCache:
    """Keys and values of a vision-language model whose positions follow from the prompts' images, as it says itself."""

    def __init__(self, model: Any, max_new_tokens: int, images: Mapping[str, Tensor]) -> None:
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._images = images

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the prompts with their images."""
        from trainers.inference.key_values import preallocated_cache

        self._cache = preallocated_cache(self._model.config, prompt_ids_BP.shape[1] + self._max_new_tokens)
        self._mask_BK = prompt_mask_BP.long()
        images = image_arguments(self._model, prompt_ids_BP, self._images)
        known = {"input_ids": prompt_ids_BP, "attention_mask": self._mask_BK, **images}
        positions = self._model._prepare_position_ids_for_generation(prompt_ids_BP, known)
        self._positions = positions[..., -1:]
        return _last_state(self._model, self._cache, prompt_ids_BP, self._mask_BK, positions, **images)

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a position."""
        self._mask_BK = torch.nn.functional.pad(self._mask_BK, (0, 1), value=1)
        self._positions = self._positions + 1
        return _last_state(self._model, self._cache, tokens_B[:, None], self._mask_BK, self._positions)

    def keep(self, rows: Tensor) -> None:
        """Select in the cache."""
        self._cache.batch_select_indices(rows)
        self._mask_BK, self._positions = self._mask_BK[rows], self._positions[..., rows, :]


class UncachedTokens:
    """No cache: the forward is computed over the whole sequence for each token.

    Rows are padded on the right, where nothing that comes before sees it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the prompts."""
        self._lengths_B = prompt_mask_BP.sum(1)
        order = prompt_mask_BP.long().argsort(dim=1, descending=True, stable=True)
        self._ids_BT = prompt_ids_BP.gather(1, order)
        return self._last()

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a token."""
        self._ids_BT = torch.nn.functional.pad(self._ids_BT, (0, 1))
        self._ids_BT.scatter_(1, self._lengths_B[:, None], tokens_B[:, None])
        self._lengths_B = self._lengths_B + 1
        return self._last()

    def keep(self, rows: Tensor) -> None:
        """Select."""
        self._ids_BT, self._lengths_B = self._ids_BT[rows], self._lengths_B[rows]

    def _last(self) -> Tensor:
        output = self._model.base_model(input_ids=self._ids_BT, attention_mask=None, use_cache=False)
        rows = torch.arange(len(self._ids_BT), device=self._ids_BT.device)
        last: Tensor = output.last_hidden_state[rows, self._lengths_B - 1]
        return last


class TargetCache:
    """Sources as an encoder left them, and the decoder's keys and values."""

    def __init__(self, model: Any, max_new_tokens: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        from trainers.inference.key_values import preallocated_cache

        self._model = model
        # T5's own configuration counts the encoder's layers, which may be fewer.
        config = model.get_decoder().config
        written, sources = preallocated_cache(config, max_new_tokens), DynamicCache(config=config)
        self._cache = EncoderDecoderCache(written, sources)

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Encode the sources and start their targets."""
        self._mask_BS = prompt_mask_BP
        self._states_BSD = encode(self._model, prompt_ids_BP, prompt_mask_BP)
        return self.advance(torch.full_like(prompt_ids_BP[:, 0], start_token(self._model)))

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a position."""
        hidden_B1D = decode(
            self._model, tokens_B[:, None], self._states_BSD, self._mask_BS, past_key_values=self._cache
        )
        last: Tensor = hidden_B1D[:, -1]
        return last

    def keep(self, rows: Tensor) -> None:
        """Select in the cache and in the sources."""
        self._cache.batch_select_indices(rows)
        self._states_BSD, self._mask_BS = self._states_BSD[rows], self._mask_BS[rows]


class RecurrentState:
    """The state of an LSTM or a GRU."""

    def __init__(self, model: Any) -> None:
        self._backbone = model.base_model

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read each prompt as a document's beginning."""
        hidden_BD, self._state_SLBH = self._backbone.read_prompts(prompt_ids_BP, prompt_mask_BP)
        return hidden_BD

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Run one step."""
        hidden_BTD, self._state_SLBH = self._backbone.run(tokens_B[:, None], self._state_SLBH)
        last: Tensor = hidden_BTD[:, -1]
        return last

    def keep(self, rows: Tensor) -> None:
        """Select in the state."""
        self._state_SLBH = self._state_SLBH[:, :, rows]


def length_groups(prompt_mask_BP: Tensor) -> list[tuple[Tensor, int]]:
    """Group left-padded prompts of similar lengths, so that little padding is read: the rows and the length of each.

    A group holds at least `GROUP_TOKENS`, but for the one of the longest prompts.
    """
    padding_B = prompt_mask_BP.long().argmax(dim=1) // LENGTH_STEP * LENGTH_STEP
    lengths_B = prompt_mask_BP.shape[1] - padding_B
    order = lengths_B.argsort(stable=True)
    lengths, counts = lengths_B.unique(return_counts=True)
    groups: list[tuple[Tensor, int]] = []
    start = stop = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        stop += count
        if (stop - start) * length >= GROUP_TOKENS or stop == len(order):
            groups.append((order[start:stop], length))
            start = stop
    return groups


def prompt_bias(prompt_mask_BP: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive B1PP mask of left-padded prompts; padding sees itself, so that no row is empty."""
    length = prompt_mask_BP.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=prompt_mask_BP.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=prompt_mask_BP.device)
    return _additive((prompt_mask_BP[:, None, :] & causal | itself)[:, None], dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
