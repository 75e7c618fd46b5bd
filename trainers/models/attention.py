"""Attention of packed sequences: the mask, and a causal kernel for CPUs that skips what the mask rules out.

B batch, H heads, G key-value heads, T tokens, K keys, C head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.models.shared_rows import over_shared_rows

CPU_ATTENTION = "block_causal"
"""Name under which transformers' models find `block_causal_attention`."""

BLOCK = 64


def attention_name(device: torch.device) -> str:
    """Return the attention implementation to build a causal model with: torch's own kernel on GPUs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("sdpa", over_shared_rows(sdpa_attention_forward))
    AttentionInterface.register(CPU_ATTENTION, over_shared_rows(block_causal_attention))
    AttentionMaskInterface.register(CPU_ATTENTION, eager_mask)
    return CPU_ATTENTION if device.type == "cpu" else "sdpa"


def packed_attention_bias(segment_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive B1TT mask: 0 where a token sees itself or an earlier one of its segment, else the least."""
    length = segment_ids_BT.shape[1]
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    bias = torch.full(same_BTT.shape, torch.finfo(dtype).min, dtype=dtype, device=segment_ids_BT.device)
    return bias.masked_fill_(same_BTT & causal_TT, 0.0)[:, None]


def segment_attention_bias(segment_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive B1TT mask of an encoder: 0 where two tokens share a segment, else the least."""
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    bias = torch.full(same_BTT.shape, torch.finfo(dtype).min, dtype=dtype, device=segment_ids_BT.device)
    return bias.masked_fill_(same_BTT, 0.0)[:, None]


def block_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend by products instead of torch's CPU kernel (2-3 times faster); `attention_mask` is additive and causal.

    query BHTC, key BGKC, value BGKD, whose heads may have another width; returns BTHD as transformers' functions do.
    """
    groups = query.shape[1] // key.shape[1]
    is_learning = torch.is_grad_enabled() and query.requires_grad
    if query.shape[2] == 1 and not is_learning and dropout == 0:
        return _attend_one(query, key, value, attention_mask, scaling).transpose(1, 2), None
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attention_mask is None and query.shape[2] > 1:
        rows, columns = query.shape[2], key.shape[2]
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        attention_mask = torch.zeros(rows, columns, dtype=query.dtype).masked_fill_(
            ~allowed, torch.finfo(query.dtype).min
        )
        attention_mask = attention_mask.view(1, 1, rows, columns)
    if dropout > 0:
        scores = torch.matmul(query * scaling, key.transpose(2, 3))
        weights = functional.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
        output = torch.matmul(functional.dropout(weights, dropout), value)
    elif is_learning and attention_mask is not None:
        output = _BlockCausal.apply(query, key, value, attention_mask, scaling)
    else:
        scores = torch.matmul(query * scaling, key.transpose(2, 3))
        if attention_mask is not None:
            scores = scores.add_(attention_mask)
        output = torch.matmul(functional.softmax(scores, dim=-1), value)
    return output.transpose(1, 2), None


def _attend_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attend from one token of each row, as sampling does: keys and values are read once, and never copied for heads.

    Products of one row take as long as reading the keys in fp32, where torch's kernel is no faster; in bf16 they take
    four times its time.
    """
    batch, heads, _, width = query.shape
    groups = heads // key.shape[1]
    if query.dtype != torch.float32:
        kernel = functional.scaled_dot_product_attention
        return kernel(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=groups > 1)
    scores = torch.matmul((query * scaling).view(batch, -1, groups, width), key.transpose(2, 3))
    if bias is not None:
        scores.view(batch, heads, 1, -1).add_(bias)
    return torch.matmul(functional.softmax(scores, dim=-1), value).view(batch, heads, 1, -1)


class _BlockCausal(torch.autograd.Function):
    """Softmax attention in row blocks, each against the keys up to its end."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
        batch, heads, rows, _ = query.shape
        query, key, value = (part.flatten(0, 1) for part in (query * scaling, key, value))
        output = query.new_empty(*query.shape[:2], value.shape[2])
        weights = []
        for start, stop, seen in _blocks(rows, key.shape[1]):
            scores = torch.bmm(query[:, start:stop], key[:, :seen].transpose(1, 2))
            scores.view(batch, heads, stop - start, seen).add_(bias[:, :, start:stop, :seen])
            weights.append(torch.softmax(scores, dim=-1))
            torch.bmm(weights[-1], value[:, :seen], out=output[:, start:stop])
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scaling = scaling
        return output.view(batch, heads, rows, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        shape = gradients[0].shape
        gradient = gradients[0].flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for block, (start, stop, seen) in zip(weights, _blocks(query.shape[1], key.shape[1]), strict=True):
            part = gradient[:, start:stop]
            grad_value[:, :seen].baddbmm_(block.transpose(1, 2), part)
            grad_block = torch.bmm(part, value[:, :seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_block, block, -1, block.dtype)
            torch.bmm(grad_scores, key[:, :seen], out=grad_query[:, start:stop])
            grad_key[:, :seen].baddbmm_(grad_scores.transpose(1, 2), query[:, start:stop])
        grads = (grad_query.mul_(ctx.scaling), grad_key, grad_value)
        return (*(grad.view(*shape[:2], -1, grad.shape[2]) for grad in grads), None, None)


def _blocks(rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Return (first row, end row, keys seen) of each block; the last row sees every column."""
    return [
        (start, min(start + BLOCK, rows), columns - rows + min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)
    ]
