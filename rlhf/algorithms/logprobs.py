"""Log-probabilities of chosen tokens, and which hidden states they come from.

Shapes: B samples, T tokens, N selected positions, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def action_states(hidden_BTD: Tensor, response_mask_BT: Tensor) -> Tensor:
    """The states [N, D] in which response tokens were chosen, row by row: each is the position before its token."""
    if bool(response_mask_BT[:, 0].any()):
        raise ValueError("a response begins at the first position: there is no state in which it was chosen")
    return hidden_BTD[:, :-1][response_mask_BT[:, 1:]]


def chosen_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    states_ND: Tensor,
    tokens_N: Tensor,
    temperature: float,
    with_entropy: bool,
    num_chunks: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token, in fp32, and the entropy of its distribution.

    `logits_of` is the language model's head. With gradients off no more than one chunk's logits exist at once. Under
    ZeRO-3 each call of the head is collective: `num_chunks` must be the same on every rank.
    """
    logprobs, entropies = [], []
    for states, tokens in zip(states_ND.tensor_split(num_chunks), tokens_N.tensor_split(num_chunks), strict=True):
        logits_NV = logits_of(states).float() / temperature
        normaliser_N = torch.logsumexp(logits_NV, dim=-1)
        logprobs.append(logits_NV.gather(-1, tokens[:, None])[:, 0] - normaliser_N)
        if with_entropy:
            expected_N = (torch.softmax(logits_NV, dim=-1) * logits_NV).sum(dim=-1)
            entropies.append(normaliser_N - expected_N)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def last_real_position(attention_mask_BT: Tensor) -> Tensor:
    """Index of each row's last True, whichever side the padding is on; token ids play no part."""
    if not bool(attention_mask_BT.any(dim=1).all()):
        raise ValueError("a row has no real token")
    positions_T = torch.arange(attention_mask_BT.shape[1], device=attention_mask_BT.device)
    return torch.where(attention_mask_BT, positions_T, -1).max(dim=1).values
