"""Packed attention: the CPU kernel against the textbook, and isolation of segments."""

import pytest
import torch

from trainers.models.attention import block_causal_attention, packed_attention_bias


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = torch.softmax(query @ key.transpose(2, 3) * scale + bias, dim=-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_kernel_equals_the_textbook_forward_and_backward(length: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8)]
    mine = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in mine]
    segments = (torch.arange(length)[None] // 20 + 1).expand(2, length)
    bias = packed_attention_bias(segments, torch.float32)
    found, _ = block_causal_attention(torch.nn.Module(), *mine, bias, 0.3)
    wanted = reference(*theirs, bias, 0.3)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    gradient = torch.randn(found.shape, generator=generator)
    found.backward(gradient)
    wanted.backward(gradient)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_without_a_graph_the_result_is_the_same() -> None:
    query, key, value = (torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    with torch.no_grad():
        plain, _ = block_causal_attention(torch.nn.Module(), query, key, value, None, 0.5)
    trained, _ = block_causal_attention(torch.nn.Module(), query.requires_grad_(), key, value, None, 0.5)
    torch.testing.assert_close(plain, trained, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_token_attends_like_the_textbook_and_copies_no_keys(dtype: torch.dtype, has_bias: bool) -> None:
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in [(3, 6, 1, 8), (3, 2, 9, 8)]]
    query, key = (tensor.to(dtype) for tensor in drawn)
    seen = torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]
    bias = torch.zeros(3, 1, 1, 9, dtype=dtype).masked_fill_(~seen[:, None, None], torch.finfo(dtype).min)
    with torch.no_grad(), torch.profiler.profile() as profile:
        found, _ = block_causal_attention(torch.nn.Module(), query, key, key, bias if has_bias else None, 0.3)
    wanted = reference(*(each.float() for each in (query, key, key)), bias.float() if has_bias else 0 * bias[:1], 0.3)
    torch.testing.assert_close(found.float(), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-5)
    assert not any("repeat_interleave" in event.key for event in profile.key_averages())


def test_no_token_sees_another_segment_or_a_later_token() -> None:
    bias = packed_attention_bias(torch.tensor([[1, 1, 2, 2, 0]]), torch.float32)[0, 0]
    assert (bias == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
