"""The sampler against transformers' own generation, and draws that depend on their uniform alone."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trainers.inference import continuation, key_values
from trainers.inference.continuation import length_groups
from trainers.inference.generation import Generation, SamplingSettings, draw, generate
from trainers.inference.key_values import PreallocatedLayer
from trainers.models.decoder import build_decoder
from trainers.models.protocol import TokenizerFacts

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
    settings = {
        "max_new_tokens": 12,
        "temperature": 1.0,
        "stop_ids": (STOP,),
        "pad_id": PAD,
        "num_tokens": VOCAB,
        **changes,
    }
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


@pytest.mark.parametrize("kind", list(SMALL))
def test_rows_that_end_and_are_dropped_equal_transformers(kind: str) -> None:
    model, stop_ids = build(kind), tuple(range(15))
    prompts = [[*prompt[: 1 + turn % len(prompt)], 20 + turn] for turn in range(8) for prompt in PROMPTS]
    ids, mask = padded(prompts)
    found = sample(model, prompts, None, stop_ids=stop_ids, max_new_tokens=20)
    keys = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD, "eos_token_id": list(stop_ids)}
    wanted = model.generate(input_ids=ids, attention_mask=mask.long(), **keys)[:, ids.shape[1] :]
    lengths = found.response_mask_BR.sum(1)
    assert found.ended_B.sum() > len(prompts) / 2
    assert len(lengths.unique()) > 4  # rows were dropped more than once
    assert found.tokens_BR[:, : wanted.shape[1]].tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", list(SMALL))
def test_preallocated_cache_draws_what_dynamic_cache_draws(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, uniforms = build(kind), np.random.default_rng(4).random((32, 40))
    found = sample(model, PROMPTS * 8, uniforms, stop_ids=(STOP, 7, 9), max_new_tokens=40)
    monkeypatch.setattr(key_values, "preallocated_cache", lambda config, max_tokens: DynamicCache(config=config))
    copied = sample(model, PROMPTS * 8, uniforms, stop_ids=(STOP, 7, 9), max_new_tokens=40)
    assert found.ended_B.sum() > 8
    assert torch.equal(found.tokens_BR, copied.tokens_BR)
    assert torch.equal(found.ended_B, copied.ended_B)


def test_preallocated_layer_holds_what_a_dynamic_layer_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = PreallocatedLayer(max_tokens=500), DynamicLayer()

    def append(rows: int, tokens: int) -> None:
        keys, values = torch.randn(2, rows, 2, tokens, 4, generator=generator)
        for mine, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()

    append(5, 7)
    for _ in range(300):  # more than the first buffer
        append(5, 1)
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([0, 2, 4]))
    append(3, 2)
    for layer in (ours, theirs):
        layer.crop(-4)
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([5, 0, 3]))
    append(3, 3)
    for layer in (ours, theirs):
        layer.reset()
    append(2, 600)  # more than was foreseen
    append(2, 1)


def test_buffers_are_not_copied_for_each_token_and_hold_the_longest_response() -> None:
    layer = PreallocatedLayer(max_tokens=60)
    states = torch.zeros(2, 2, 20, 4)
    at = {layer.update(states, states)[0].data_ptr()}
    for _ in range(40):
        keys, _ = layer.update(states[:, :, :1], states[:, :, :1])
        at.add(keys.data_ptr())
    assert len(at) == 1
    assert keys.untyped_storage().nbytes() == 4 * 2 * 2 * 60 * 4


def test_sliding_windows_keep_transformers_own_layers() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {**SMALL["llama"], "num_key_value_heads": 2, "sliding_window": 6}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**sizes, vocab_size=VOCAB, eos_token_id=STOP, pad_token_id=PAD)).eval()
    found = sample(model, PROMPTS[:1], None, stop_ids=(STOP,), max_new_tokens=20)
    ids, mask = padded(PROMPTS[:1])
    keys = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    wanted = model.generate(input_ids=ids, attention_mask=mask.long(), **keys)[:, ids.shape[1] :]
    assert found.tokens_BR[:, : wanted.shape[1]].tolist() == wanted.tolist()
    layers = key_values.preallocated_cache(model.config, 25).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer] * 2


def test_a_response_does_not_depend_on_its_batch() -> None:
    model = build("llama")
    uniforms = np.random.default_rng(0).random((4, 12))
    together = sample(model, PROMPTS, uniforms)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], uniforms[row : row + 1])
        assert alone.tokens_BR[0].tolist() == together.tokens_BR[row].tolist()
        assert alone.ended_B[0] == together.ended_B[row]


def test_a_prompt_of_several_responses_is_read_once() -> None:
    model = build("llama")
    rows = [0, 0, 0, 1, 2, 2]
    uniforms = np.random.default_rng(0).random((6, 12))
    read: list[tuple[int, ...]] = []
    backbone: torch.nn.Module = model.base_model
    hook = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = sample(model, [PROMPTS[row] for row in rows], uniforms, stop_ids=())
    hook.remove()
    assert read == [(3, 5), *[(6, 1)] * 11]
    for place, row in enumerate(rows):
        alone = sample(model, [PROMPTS[row]], uniforms[place : place + 1], stop_ids=())
        assert alone.tokens_BR[0].tolist() == together.tokens_BR[place].tolist()


@pytest.mark.parametrize("kind", list(SMALL))
def test_prompts_read_by_length_draw_what_they_draw_read_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    lengths = [40, 3, 17, 33, 20, 1, 40, 8]
    prompts = [[2 + (row + position) % 48 for position in range(length)] for row, length in enumerate(lengths)]
    uniforms = np.random.default_rng(8).random((len(prompts), 12))
    together = sample(model, prompts, uniforms)
    monkeypatch.setattr(continuation, "GROUP_TOKENS", 1)
    read: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _arguments, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    apart = sample(model, prompts, uniforms)
    assert read[:3] == [(3, 8), (2, 24), (3, 40)]
    assert torch.equal(apart.tokens_BR, together.tokens_BR)
    torch.testing.assert_close(apart.logprobs_BR, together.logprobs_BR, rtol=1e-4, atol=1e-5)


def test_groups_of_similar_lengths_hold_every_prompt_and_enough_tokens() -> None:
    lengths = torch.from_numpy(np.random.default_rng(2).integers(1, 301, 200))
    lengths[7] = 300
    mask = torch.arange(300)[None, :] >= 300 - lengths[:, None]
    groups = length_groups(mask)
    assert torch.cat([members for members, _ in groups]).sort().values.tolist() == list(range(200))
    assert all(int(lengths[members].max()) <= longest for members, longest in groups)
    assert all(len(members) * longest >= continuation.GROUP_TOKENS for members, longest in groups[:-1])
    assert sum(len(members) * longest for members, longest in groups) < 0.6 * mask.numel()
    assert len(length_groups(mask[:3, -4:])) == 1


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


def test_the_sampler_tells_the_log_probabilities_of_what_it_drew() -> None:
    model = build("llama")
    uniforms = np.random.default_rng(3).random((4, 12))
    found = sample(model, PROMPTS, uniforms, temperature=0.7, stop_ids=tuple(range(10)))
    for prompt, tokens, mask, logprobs in zip(
        PROMPTS, found.tokens_BR, found.response_mask_BR, found.logprobs_BR, strict=True
    ):
        count = int(mask.sum())
        row = torch.tensor([[*prompt, *tokens[:count].tolist()]])
        with torch.no_grad():
            wanted = (model(input_ids=row).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(logprobs[:count], wanted[range(count), tokens[:count]], rtol=1e-4, atol=1e-5)
        assert not logprobs[count:].any()
    greedy = sample(model, PROMPTS, None)
    assert not greedy.logprobs_BR.any()


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


def test_rows_without_a_token_are_never_drawn() -> None:
    model, known = build("llama"), 20
    uniforms = np.random.default_rng(1).random((4, 12))
    for draws in (None, uniforms):
        everything = sample(model, PROMPTS, draws)
        assert (everything.tokens_BR[everything.response_mask_BR] >= known).any()
        found = sample(model, PROMPTS, draws, num_tokens=known)
        assert (found.tokens_BR < known).all()


def test_a_padded_embedding_draws_what_one_without_padding_draws() -> None:
    model, padded_model = build("llama"), build("llama")
    torch.manual_seed(0)
    padded_model.resize_token_embeddings(VOCAB + 14, mean_resizing=False)
    with torch.no_grad():
        padded_model.get_output_embeddings().weight[VOCAB:] *= 100
    uniforms = np.random.default_rng(1).random((4, 12))
    wanted, found = sample(model, PROMPTS, uniforms), sample(padded_model, PROMPTS, uniforms)
    assert found.tokens_BR.tolist() == wanted.tokens_BR.tolist()
