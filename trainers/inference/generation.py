"""Sampling token by token: inverse-CDF draws from given uniforms, so that a draw depends on its key alone.

B batch, P prompt tokens, R response tokens, K cached tokens, V vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainers.data.tokenizer import Tokenization
from trainers.inference.continuation import Continuation, continuation_of
from trainers.models.forward_forms import head_logits
from trainers.runtime.observer import Watch

COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch when fewer than this share of it is left."""


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
    continuation = continuation_of(model, length, images or {})
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


def draw(logits_BV: Tensor, temperature: float, uniforms_B: Tensor | None) -> Tensor:
    """Draw one token per row by the inverse of the cumulative distribution; None takes the likeliest."""
    if uniforms_B is None:
        return logits_BV.argmax(dim=-1)
    cumulative = torch.softmax(logits_BV / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    wanted = uniforms_B[:, None].to(torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_(max=logits_BV.shape[1] - 1)


def _chosen_logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(dim=1)


def _end_at_stop(tokens_BR: Tensor, mask_BR: Tensor, stop_ids: Tensor, pad_id: int) -> None:
    """Blank what rows that had ended drew while others went on."""
    is_stop = torch.isin(tokens_BR, stop_ids) & mask_BR
    after = is_stop.long().cumsum(1) - is_stop.long() > 0
    mask_BR &= ~after
    tokens_BR.masked_fill_(~mask_BR, pad_id)
