"""Sampling token by token: inverse-CDF draws from given uniforms, so that a draw depends on its key alone.

B batch, P prompt tokens, R response tokens, K cached tokens, V vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainers.data.tokenizer import Tokenization
from trainers.models.encoder_decoder import decode, encode, start_token
from trainers.models.forward_forms import has_windows, head_logits, image_arguments, record_of
from trainers.models.token_losses import is_recurrent
from trainers.runtime.observer import Watch

COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch when fewer than this share of it is left."""

LENGTH_STEP = 16
"""Prompts whose padding differs by fewer tokens are read together."""

GROUP_TOKENS = 1024
"""Tokens that are worth a forward: fewer of similar prompts are read with longer ones."""


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn; stop ids end a response and belong to it."""

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    num_tokens: int
    """Ids from here on are rows of the embedding without a token: they are never drawn."""


def sampling_settings(
    tokenization: Tokenization, max_new_tokens: int, temperature: float = 1.0, stop_tokens: Sequence[str] = ()
) -> SamplingSettings:
    """Say how responses are drawn from a model with this tokenizer: its end tokens end them, and `stop_tokens` too."""
    return SamplingSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=(*tokenization.end_ids, *(tokenization.token_id(token) for token in stop_tokens)),
        pad_id=tokenization.pad_id,
        num_tokens=tokenization.vocab_size,
    )


@dataclass(frozen=True)
class Generation:
    """Responses, right-padded with the pad id to `max_new_tokens`."""

    tokens_BR: Tensor
    response_mask_BR: Tensor
    """True at response tokens, the stop token included."""
    ended_B: Tensor
    """True where a stop token came."""
    logprobs_BR: Tensor
    """Of the drawn tokens, in fp32 at the sampling temperature; 0 past a response's end, and where nothing is drawn."""


@torch.no_grad()
def generate(
    module: nn.Module,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    settings: SamplingSettings,
    uniforms_BR: np.ndarray | None,
    images: Mapping[str, Tensor] | None = None,
    watch: Watch | None = None,
) -> Generation:
    """Continue left-padded prompts, or write the targets of sources; `uniforms_BR` (fp64, [0, 1)) None draws greedily.

    `images` are what a vision-language model takes of the images of the prompts' image tokens, in their order. `watch`
    hears of every token, and may raise.

    `module` is a causal language model or an encoder-decoder in evaluation mode with whole parameters. Sources may be
    padded on either side where the encoder's positions are relative, else on the right. Runs no collective.
    """
    model: Any = module
    device = prompt_ids_BP.device
    rows, length = prompt_ids_BP.shape[0], settings.max_new_tokens
    tokens = torch.full((rows, length), settings.pad_id, dtype=torch.int64, device=device)
    mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, length, device=device)
    draws = None if uniforms_BR is None else torch.from_numpy(np.ascontiguousarray(uniforms_BR)).to(device)
    stop_ids = torch.tensor(settings.stop_ids, dtype=torch.int64, device=device)

    alive = torch.arange(rows, device=device)
    continuation = _continuation(model, length, images or {})
    hidden_BD = _read_prompts(continuation, prompt_ids_BP, prompt_mask_BP.bool(), bool(images))
    for step in range(length):
        logits_BV = head_logits(model, hidden_BD)[:, : settings.num_tokens].float()
        drawn_B = draw(logits_BV, settings.temperature, None if draws is None else draws[alive, step])
        tokens[alive, step] = drawn_B
        mask[alive, step] = True
        if draws is not None:
            logprobs[alive, step] = _chosen_logprobs(logits_BV / settings.temperature, drawn_B)
        going_B = ~torch.isin(drawn_B, stop_ids) & ~ended[alive]
        ended[alive] = ~going_B
        num_going = int(going_B.sum())
        if num_going == 0 or step + 1 == length:
            break
        if watch is not None:
            watch(1 - num_going / rows * (1 - (step + 1) / length))
        if num_going < COMPACT_BELOW * len(alive):
            kept = going_B.nonzero()[:, 0]
            continuation.keep(kept)
            alive, drawn_B = alive[kept], drawn_B[kept]
        hidden_BD = continuation.advance(drawn_B)
    _end_at_stop(tokens, mask, stop_ids, settings.pad_id)
    return Generation(tokens, mask, ended, logprobs.where(mask, 0.0))


class Continuation(Protocol):
    """What a model remembers of the rows that it continues."""

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the left-padded prompts; returns the hidden states [B, D] to predict their next tokens from."""

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Read one more token of every row; returns the hidden states [B, D] after it."""

    def keep(self, rows: Tensor) -> None:
        """Continue these rows alone; one that is named several times is continued in several ways."""


def _read_prompts(continuation: Continuation, ids_BP: Tensor, mask_BP: Tensor, has_images: bool) -> Tensor:
    """Read the prompts; one that is repeated in the next rows, for several responses, is read once."""
    differs_B = torch.ones(len(ids_BP), dtype=torch.bool, device=ids_BP.device)
    differs_B[1:] = (ids_BP[1:] != ids_BP[:-1]).any(dim=1) | (mask_BP[1:] != mask_BP[:-1]).any(dim=1)
    if has_images or bool(differs_B.all()):
        return continuation.read(ids_BP, mask_BP)
    hidden_BD = continuation.read(ids_BP[differs_B], mask_BP[differs_B])
    readings_B = differs_B.cumsum(0) - 1
    continuation.keep(readings_B)
    return hidden_BD[readings_B]


def _continuation(model: Any, max_new_tokens: int, images: Mapping[str, Tensor]) -> Continuation:
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


def draw(logits_BV: Tensor, temperature: float, uniforms_B: Tensor | None) -> Tensor:
    """Draw one token per row by the inverse of the cumulative distribution; None takes the likeliest."""
    if uniforms_B is None:
        return logits_BV.argmax(dim=-1)
    cumulative = torch.softmax(logits_BV / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    wanted = uniforms_B[:, None].to(torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_(max=logits_BV.shape[1] - 1)


def _chosen_logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(dim=1)


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


def _end_at_stop(tokens_BR: Tensor, mask_BR: Tensor, stop_ids: Tensor, pad_id: int) -> None:
    """Blank what rows that had ended drew while others went on."""
    is_stop = torch.isin(tokens_BR, stop_ids) & mask_BR
    after = is_stop.long().cumsum(1) - is_stop.long() > 0
    mask_BR &= ~after
    tokens_BR.masked_fill_(~mask_BR, pad_id)
