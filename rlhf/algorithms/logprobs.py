"""Log-probabilities of chosen tokens, and which hidden states they come from.

Shapes: B samples, T tokens, N selected positions, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Entropy = Literal["none", "measured", "learnt"]
"""What is wanted of a distribution's entropy: measured, it has no gradient."""
_AT_ONCE = 1 << 21
"""Numbers that exist at once beside logits and their gradient."""


def action_states(hidden_BTD: Tensor, action_mask_BT: Tensor) -> Tensor:
    """The states [N, D] in which the actions were chosen, row by row: each is the position before its token."""
    if bool(action_mask_BT[:, 0].any()):
        raise ValueError("a response begins at the first position: there is no state in which it was chosen")
    return hidden_BTD[:, :-1][action_mask_BT[:, 1:]]


def chosen_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    states_ND: Tensor,
    tokens_N: Tensor,
    temperature: float,
    entropy: Entropy,
    num_chunks: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token, in fp32, and where it is wanted the entropy of its distribution.

    `logits_of` is the language model's head. With gradients off no more than one chunk's logits exist at once. Under
    ZeRO-3 each call of the head is collective: `num_chunks` must be the same on every rank.
    """
    logprobs, entropies = [], []
    for states, tokens in zip(states_ND.tensor_split(num_chunks), tokens_N.tensor_split(num_chunks), strict=True):
        logits_NV = logits_of(states)
        if temperature != 1.0:
            logits_NV = logits_NV.float() / temperature
        if entropy == "learnt":
            logits_NV, normaliser_N = logits_NV.float(), _normalisers(logits_NV)
            logprobs.append(logits_NV.gather(-1, tokens[:, None])[:, 0] - normaliser_N)
            entropies.append(_entropies(logits_NV, normaliser_N))
            continue
        logprobs.append(token_logprobs(logits_NV, tokens))
        if entropy == "measured":
            with torch.no_grad():
                parts = logits_NV.split(_rows_at_once(logits_NV))
                entropies += [_entropies(part.float(), _normalisers(part)) for part in parts]
    return torch.cat(logprobs), torch.cat(entropies) if entropies else None


def _entropies(logits_NV: Tensor, normalisers_N: Tensor) -> Tensor:
    return normalisers_N - (torch.softmax(logits_NV, dim=-1) * logits_NV).sum(dim=-1)


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability of each token, in fp32; beside the logits no more than their gradient exists at once."""
    result: Tensor = _TokenLogprobs.apply(logits_NV, tokens_N)
    return result


class _TokenLogprobs(torch.autograd.Function):
    """log softmax at one place a row: its gradient is onehot - softmax, made a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        normaliser = _normalisers(logits)
        ctx.save_for_backward(logits, tokens, normaliser)
        return logits.gather(-1, tokens[:, None])[:, 0].float() - normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, tokens, normaliser = ctx.saved_tensors
        result = torch.empty_like(logits)
        size = _rows_at_once(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            scale = gradients[0][rows, None]
            part = (logits[rows].float() - normaliser[rows, None]).exp_().mul_(-scale)
            result[rows] = part.scatter_add_(1, tokens[rows, None], scale)
        return result, None


def _normalisers(logits_NV: Tensor) -> Tensor:
    """Of each row in fp32, made a few rows at a time: the same bits with an entropy and without."""
    return torch.cat([part.float().logsumexp(dim=-1) for part in logits_NV.split(_rows_at_once(logits_NV))])


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _AT_ONCE // logits.shape[1])


def last_real_position(attention_mask_BT: Tensor) -> Tensor:
    """Index of each row's last True, whichever side the padding is on; token ids play no part."""
    if not bool(attention_mask_BT.any(dim=1).all()):
        raise ValueError("a row has no real token")
    positions_T = torch.arange(attention_mask_BT.shape[1], device=attention_mask_BT.device)
    return torch.where(attention_mask_BT, positions_T, -1).max(dim=1).values
