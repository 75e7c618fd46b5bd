"""KL estimators against the exact value on a small vocabulary, and the adaptive coefficient."""

import math

import pytest
import torch

from rlhf.algorithms.kl import adapted_kl_coef, exact_kl, k1, k2, k3


def test_estimators_by_hand() -> None:
    logprob, reference = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))
    assert float(k1(logprob, reference)) == pytest.approx(math.log(2))
    assert float(k2(logprob, reference)) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(k3(logprob, reference)) == pytest.approx(0.5 - 1 + math.log(2), rel=1e-5)


def test_exact_kl_by_hand() -> None:
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert float(exact_kl(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_k1_and_k3_are_unbiased_within_three_sigma() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(10, generator=generator) for _ in range(2))
    exact = float(exact_kl(p, q))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 40_000, replacement=True, generator=generator)
    for estimator in (k1, k3):
        samples = estimator(log_p[tokens], log_q[tokens]).double()
        assert abs(float(samples.mean()) - exact) < 3 * float(samples.std()) / math.sqrt(len(samples))


def test_all_are_zero_for_equal_policies_and_k3_is_never_negative() -> None:
    logprobs = -torch.rand(100)
    for estimator in (k1, k2, k3):
        assert float(estimator(logprobs, logprobs).abs().max()) == 0
    assert float(k3(logprobs, -3 * torch.rand(100)).min()) >= 0


@pytest.mark.parametrize(
    ("measured", "wanted"), [(6.0, 0.1), (12.0, 0.1 * (1 + 0.2 * 0.01)), (6.6, 0.1 * (1 + 0.1 * 0.01)), (0.0, 0.0998)]
)
def test_adaptive_coefficient_by_hand(measured: float, wanted: float) -> None:
    assert adapted_kl_coef(0.1, measured, target=6.0, horizon=10_000, num_samples=100) == pytest.approx(wanted)
