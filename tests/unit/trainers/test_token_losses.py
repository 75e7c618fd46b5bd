"""Chunked cross-entropy against torch's own."""

import pytest
import torch

from trainers.models import token_losses
from trainers.models.token_losses import linear_cross_entropy


@pytest.mark.parametrize("chunk_elements", [11, 40, 10**6])
def test_loss_and_gradients_equal_torchs(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(17, 6, generator=generator)).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (17,), generator=generator)
    found = linear_cross_entropy(hidden, weight, targets)
    (found * 0.5).backward()
    grads = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (wanted * 0.5).backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads, [hidden.grad, weight.grad], atol=1e-5, rtol=1e-4)


def test_a_hopeless_target_has_a_finite_loss() -> None:
    loss = linear_cross_entropy(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[500.0, 0.0], [-500.0, 0.0]]), torch.tensor([1])
    )
    assert float(loss) == pytest.approx(1000.0)


def test_no_target_gives_a_zero_that_can_be_trained_on() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(torch.zeros(0, 4, requires_grad=True), weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(weight.grad.abs().sum()) == 0.0


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2])).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bounded_logits_have_the_gradients_of_torch_s_own() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    targets, cap = torch.tensor([0, 1, 2, 3, 4, 0]), 1.5
    linear_cross_entropy(hidden, weight, targets, cap).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad, weight.grad = None, None
    logits = torch.tanh(hidden @ weight.T / cap) * cap
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad))
