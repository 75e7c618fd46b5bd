"""Rollout reports and the stop rule."""

import pytest
import torch

from rlhf.monitors import broken_rule, report_rollouts


def test_report_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    report = report_rollouts(
        scores_N=torch.tensor([1.0, 3.0]),
        responses=[[5, 6], [5]],
        response_mask_NR=mask,
        ended_N=torch.tensor([True, False]),
        logprobs_NR=torch.tensor([[-1.0, -1.0], [-1.0, 7.0]]),
        reference_logprobs_NR=torch.tensor([[-2.0, -1.0], [-4.0, -7.0]]),
        entropy_NR=torch.tensor([[1.0, 2.0], [3.0, 99.0]]),
        by_term={"judge": torch.tensor([1.0, 3.0]), "rule": torch.tensor([0.0, 1.0])},
        shaped_scores_N=torch.tensor([0.5, -1.0]),
        sampler_logprobs_NR=torch.tensor([[-1.0, -1.5], [-0.75, 0.0]]),
    )
    assert report.score_mean == 2.0
    assert report.score_std == 1.0
    terms = {name: value for name, value in report.metrics().items() if name.startswith("reward")}
    assert terms == {"reward/judge": 2.0, "reward/rule": 0.5}
    assert report.kl == pytest.approx(2.0)
    assert report.entropy == pytest.approx(2.0)
    assert report.length_mean == 1.5
    assert report.eos_rate == 0.5
    assert report.length_correlation == pytest.approx(-1.0)
    assert report.shaped_score_mean == report.optimised_score == -0.25
    assert report.sampler_gap == 0.25
    assert report.sampler_gap_max == 0.5
    assert not report.kl_alarm
    assert broken_rule(report, 1.9) == "kl_limit"
    assert broken_rule(report, 2.1) is None
    assert broken_rule(report, None) is None


def test_a_negative_mean_k1_raises_the_alarm() -> None:
    ones = torch.ones(3, 4)
    report = report_rollouts(
        torch.zeros(3),
        [[1] * 4] * 3,
        ones.bool(),
        torch.ones(3).bool(),
        -2 * ones,
        -1 * ones,
        ones,
        by_term={},
        shaped_scores_N=torch.zeros(3),
        sampler_logprobs_NR=-2 * ones,
    )
    assert report.kl == pytest.approx(-4.0)
    assert report.kl_alarm
