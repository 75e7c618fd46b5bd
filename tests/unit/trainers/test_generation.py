"""The sampler against transformers' own generation, and draws that depend on their uniform alone."""

import numpy as np
import pytest
import torch

from trainers.architectures.decoder import TokenizerFacts, build_decoder
from trainers.generation import Generation, SamplingSettings, draw, generate

VOCAB, PAD, STOP = 50, 1, 0
SMALL = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20], [30, 31, 32]]


def build(kind: str) -> torch.nn.Module:
    model = build_decoder(
        {"type": kind, **SMALL[kind]}, TokenizerFacts(VOCAB, STOP, PAD), seed=3, device=torch.device("cpu")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, mask


def sample(
    model: torch.nn.Module, prompts: list[list[int]], uniforms: np.ndarray | None, **changes: object
) -> Generation:
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": (STOP,), "pad_id": PAD, **changes}
    return generate(model, *padded(prompts), SamplingSettings(**settings), uniforms)


@pytest.mark.parametrize("kind", list(SMALL))
def test_greedy_equals_transformers(kind: str) -> None:
    model = build(kind)
    ids, mask = padded(PROMPTS)
    found = sample(model, PROMPTS, None, max_new_tokens=10)
    wanted = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=10,
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=PAD,
    )[:, ids.shape[1] :]
    assert found.tokens_BR[:, : wanted.shape[1]].tolist() == wanted.tolist()


def test_a_response_does_not_depend_on_its_batch() -> None:
    model = build("llama")
    uniforms = np.random.default_rng(0).random((4, 12))
    together = sample(model, PROMPTS, uniforms)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], uniforms[row : row + 1])
        assert alone.tokens_BR[0].tolist() == together.tokens_BR[row].tolist()
        assert alone.ended_B[0] == together.ended_B[row]


def test_mask_ends_with_the_stop_token_and_padding_follows() -> None:
    model = build("llama")
    found = sample(model, PROMPTS * 8, np.random.default_rng(1).random((32, 12)), stop_ids=tuple(range(25)))
    assert found.ended_B.any()
    lengths = found.response_mask_BR.sum(1)
    assert len(set(lengths.tolist())) > 2
    for tokens, mask, ended in zip(
        found.tokens_BR.tolist(), found.response_mask_BR.tolist(), found.ended_B, strict=True
    ):
        count = sum(mask)
        assert mask == [True] * count + [False] * (12 - count)
        assert tokens[count:] == [PAD] * (12 - count)
        assert all(token >= 25 for token in tokens[: count - 1])
        assert (tokens[count - 1] < 25) == bool(ended)
        assert ended or count == 12


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = draw(probabilities.log().float().expand(10_000, 4), 1.0, uniforms)
    assert (drawn.bincount(minlength=4) / 10_000).tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=2e-4)


def test_the_smallest_and_largest_uniforms_draw_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert draw(logits, 0.7, torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)).tolist() == [1, 2]


def test_low_temperature_becomes_greedy() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    drawn = draw(logits, 1e-4, torch.full((6,), 0.37, dtype=torch.float64))
    assert drawn.tolist() == logits.argmax(1).tolist()
