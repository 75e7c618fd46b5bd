"""GAE and whitening against numbers worked out by hand and a slow reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algorithms.advantages import estimate_advantages, whiten


def slow_gae(
    rewards: list[float], values: list[float], acted: list[bool], gamma: float, lam: float, bootstrap: float
) -> list[float]:
    """The definition: A_t = sum over later actions of (gamma lam)^k delta, on the acted tokens alone."""
    steps = [t for t, flag in enumerate(acted) if flag]
    advantages = [0.0] * len(rewards)
    for first, t in enumerate(steps):
        total = 0.0
        for k, u in enumerate(steps[first:]):
            place = first + k
            after = values[steps[place + 1]] if place + 1 < len(steps) else bootstrap
            total += (gamma * lam) ** k * (rewards[u] + gamma * after - values[u])
        advantages[t] = total
    return advantages


def test_two_tokens_by_hand() -> None:
    # deltas: 1 + 0.5*0.5 - 0.25 = 1, then 2 + 0 - 0.5 = 1.5; advantage_0 = 1 + 0.5*0.8*1.5 = 1.6
    advantages, returns = estimate_advantages(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.5]]), torch.tensor([[True, True]]), gamma=0.5, lam=0.8
    )
    torch.testing.assert_close(advantages, torch.tensor([[1.6, 1.5]]))
    torch.testing.assert_close(returns, torch.tensor([[1.85, 2.0]]))


def test_lambda_one_is_monte_carlo() -> None:
    rewards = torch.tensor([[0.1, -0.2, 3.0]])
    values = torch.tensor([[1.0, 2.0, -1.0]])
    _, returns = estimate_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[2.9, 2.8, 3.0]]))


def test_value_and_advantage_are_carried_across_tokens_of_others() -> None:
    acted = torch.tensor([[True, False, False, True]])
    rewards = torch.tensor([[1.0, 50.0, 50.0, 2.0]])
    values = torch.tensor([[0.25, 9.0, 9.0, 0.5]])
    advantages, returns = estimate_advantages(rewards, values, acted, gamma=0.5, lam=0.8)
    torch.testing.assert_close(advantages, torch.tensor([[1.6, 0.0, 0.0, 1.5]]))
    torch.testing.assert_close(returns, torch.tensor([[1.85, 0.0, 0.0, 2.0]]))


def test_bootstrap_adds_the_value_after_the_end() -> None:
    rewards, values, acted = torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    advantages, _ = estimate_advantages(rewards, values, acted, 0.5, 0.95, bootstrap_B=torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(advantages, torch.tensor([[2.0], [0.0]]))


@given(st.data())
def test_equals_the_definition(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 7))
    numbers = st.floats(-3, 3, width=32)
    rows = data.draw(st.integers(1, 3))
    table = st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=rows, max_size=rows)
    rewards, values = data.draw(table), data.draw(table)
    acted = data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows))
    gamma, lam = data.draw(st.floats(0.1, 1)), data.draw(st.floats(0, 1))
    bootstrap = data.draw(st.lists(numbers, min_size=rows, max_size=rows))
    got, returns = estimate_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(acted),
        gamma,
        lam,
        torch.tensor(bootstrap, dtype=torch.float64),
    )
    for row in range(rows):
        wanted = slow_gae(rewards[row], values[row], acted[row], gamma, lam, bootstrap[row])
        torch.testing.assert_close(got[row], torch.tensor(wanted, dtype=torch.float64))
    assert torch.equal(returns == 0, (returns == 0) | ~torch.tensor(acted))


def test_whiten_by_hand_and_leaves_padding_out() -> None:
    x = torch.tensor([[1.0, 3.0, 1000.0]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


def test_whiten_divides_by_n_not_n_minus_one() -> None:
    x: Tensor = torch.tensor([[0.0, 2.0, 4.0, 6.0]])
    white = whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert float((white**2).mean()) == pytest.approx(1.0)
    assert float(white.sum()) == pytest.approx(0.0, abs=1e-6)


def test_whiten_of_nothing_is_zero() -> None:
    assert whiten(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).abs().sum() == 0
