"""Log-probabilities, their positions, and the last real token."""

import pytest
import torch

from rlhf.algorithms import logprobs
from rlhf.algorithms.logprobs import action_states, chosen_logprobs, last_real_position
from rlhf.text.policy import response_logprobs
from rlhf.text.responses import Responses
from trainers.models.decoder import build_decoder
from trainers.models.protocol import TokenizerFacts


def test_equals_log_softmax_at_the_sampling_temperature_in_any_number_of_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    tokens = torch.tensor([0, 10, 3, 3, 1, 9, 5])
    wanted = torch.log_softmax(states @ head.T / 0.7, dim=-1)
    for chunks in (1, 2, 7, 9):
        logprobs, entropy = chosen_logprobs(lambda x: x @ head.T, states, tokens, 0.7, "measured", num_chunks=chunks)
        torch.testing.assert_close(logprobs, wanted.gather(-1, tokens[:, None])[:, 0])
        torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1))


def test_entropy_is_left_out_when_not_asked_for() -> None:
    _, entropy = chosen_logprobs(lambda x: x, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 1.0, "none")
    assert entropy is None


def test_an_action_is_chosen_in_the_state_before_its_token() -> None:
    hidden = torch.arange(12.0).reshape(2, 6, 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    assert action_states(hidden, mask).flatten().tolist() == [2.0, 3.0, 6.0, 9.0]


def test_a_response_needs_a_state_before_it() -> None:
    with pytest.raises(ValueError, match="first position"):
        action_states(torch.zeros(1, 2, 1), torch.tensor([[True, False]]))


def test_last_real_position_comes_from_the_mask() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert last_real_position(mask).tolist() == [2, 3, 2, 0]


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no real token"):
        last_real_position(torch.zeros(1, 3, dtype=torch.bool))


def test_rows_without_a_token_have_no_share_of_the_distribution() -> None:
    """As in sampling, which never draws them."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    cpu = torch.device("cpu")
    network = build_decoder({"type": "llama", **sizes}, TokenizerFacts(30, 0, 1), seed=0, device=cpu)
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.bool)
    written = torch.tensor([[False, False, True, True]])
    responses = Responses(ids, mask, written, torch.tensor([True]), torch.tensor([0]))
    with torch.no_grad():
        network.get_output_embeddings().weight[20:] *= 50
        found = response_logprobs(network, responses, 0.7, num_tokens=20)
        logits = network(ids).logits[0, 1:3, :20] / 0.7
    torch.testing.assert_close(found[0], torch.log_softmax(logits, -1)[[0, 1], [5, 6]])


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_token_logprobs_and_their_gradient_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(logprobs, "_AT_ONCE", rows_at_once * 11)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 11, generator=generator) * 5).requires_grad_()
    tokens, scale = torch.randint(0, 11, (7,), generator=generator), torch.randn(7, generator=generator)
    found = logprobs.token_logprobs(logits, tokens)
    wanted = logits.double().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((found * scale).sum(), logits)
    (exact,) = torch.autograd.grad((wanted * scale).sum(), logits)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)
    halves = logits.detach().bfloat16().requires_grad_()
    (rounded,) = torch.autograd.grad((logprobs.token_logprobs(halves, tokens) * scale).sum(), halves)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_logits_is_kept_for_the_update_and_an_entropy_changes_no_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 5, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(50, 5, generator=generator).to(dtype)
    tokens = torch.arange(7)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learnt, _ = chosen_logprobs(lambda x: x @ head.T, states, tokens, 1.0, "none")
    assert kept.count((7, 50)) == 1
    judged, _ = chosen_logprobs(lambda x: x @ head.T, states, tokens, 1.0, "learnt")
    assert torch.equal(learnt, judged)
    (gradient,), (other,) = (torch.autograd.grad(each.sum(), states) for each in (learnt, judged))
    assert torch.equal(gradient, other)
