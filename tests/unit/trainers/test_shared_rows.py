"""Rows that begin alike: read once, they say what they say when each is read alone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from trainers.models.decoder import build_decoder
from trainers.models.forward_forms import can_share_rows
from trainers.models.protocol import TokenizerFacts
from trainers.models.shared_rows import SharedRows

SIZES: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
PROMPTS, ANSWERS = [5, 5, 3, 5, 3], [4, 7, 2, 1, 6]
"""Lengths: rows 0, 1 and 3 share a prompt, and so do 2 and 4."""


def decoder(kind: str, **further: Any) -> Any:
    sizes = GPT2 if kind == "gpt2" else {**SIZES, **further}
    return build_decoder({"type": kind, **sizes}, TokenizerFacts(40, 0, 1), seed=0, device=torch.device("cpu")).double()


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, where they are real, and where they are a row's own."""
    places = torch.arange(12)
    prompts, answers = torch.tensor(PROMPTS)[:, None], torch.tensor(ANSWERS)[:, None]
    ids = torch.randint(2, 40, (5, 12), generator=torch.Generator().manual_seed(3))
    ids[[1, 3], :5], ids[4, :3] = ids[0, :5], ids[2, :3].clone()
    real = places < prompts + answers
    return ids.where(real, 1), real, real & (places >= prompts)


@pytest.mark.parametrize("kernel", ["block_causal", "sdpa"])
@pytest.mark.parametrize(("kind", "bound"), [("gpt2", 1e-10), ("llama", 1e-4), ("qwen3", 1e-4)])  # norms in fp32
def test_states_and_gradients_are_those_of_rows_that_are_read_alone(kind: str, bound: float, kernel: str) -> None:
    model = decoder(kind).eval()
    model.set_attn_implementation(kernel)
    assert can_share_rows(model)
    ids, real, own = rows()
    shared = SharedRows.of(ids, real, own)
    assert shared is not None
    assert len(shared.chosen_N) == 5 + 3 + sum(ANSWERS)
    weights = torch.randn(5, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * real[..., None]
    found = []
    for told in ({"input_ids": ids}, shared.inputs(ids)):
        states = model.base_model(**told, use_cache=False).last_hidden_state
        states = states if told.get("shared_rows") is None else shared.spread(states)
        model.zero_grad()
        (states * weights).sum().backward()
        gradients = [parameter.grad for parameter in model.base_model.parameters()]
        found.append((states[real].detach(), *(gradient for gradient in gradients if gradient is not None)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def test_little_that_is_shared_is_read_as_it_is() -> None:
    ids, real, own = rows()
    ids[:, 0] = torch.arange(2, 7)
    assert SharedRows.of(ids, real, own) is None


@pytest.mark.parametrize(("kind", "further"), [("mistral", {"sliding_window": 4}), ("bloom", {})])
def test_a_model_that_mixes_tokens_otherwise_reads_every_row(kind: str, further: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4} if kind == "bloom" else {**SIZES, **further}
    model = build_decoder({"type": kind, **sizes}, TokenizerFacts(40, 0, 1), seed=0, device=torch.device("cpu"))
    assert not can_share_rows(model)
