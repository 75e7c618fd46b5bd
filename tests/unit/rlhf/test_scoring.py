"""Scores to per-token rewards, by hand."""

import pytest
import torch

from rlhf.algorithms.scoring import ScoreStatistics, shaped_scores, token_rewards
from rlhf.rewards.terms import TextTerm
from rlhf.text.rewards import JudgeTerm, TextReward


def test_normalise_clip_and_penalty_by_hand() -> None:
    raw, statistics = torch.tensor([3.0, 1.0, 99.0, -99.0]), ScoreStatistics(mean=1.0, std=2.0)
    assert statistics.normalise(raw).tolist() == [1.0, 0.0, 49.0, -50.0]
    ended = torch.tensor([True, False, True, False])
    clipped = JudgeTerm("judge", statistics, clip=5.0).normalised(raw)
    assert shaped_scores(clipped, ended, 1.0).tolist() == [1.0, -1.0, 5.0, -6.0]


def test_terms_are_weighted_and_a_reward_models_share_is_normalised_and_clipped() -> None:
    judge, rule = JudgeTerm("judge", ScoreStatistics(1.0, 2.0), clip=1.5), TextTerm("rule", lambda texts, rows: [])
    reward = TextReward({"rule": 3.0, "judge": -2.0}, [judge], [rule])
    by_term = reward.by_term([{"rule": 1.0}, {"rule": 0.5}], torch.tensor([9.0, 2.0]))
    assert {name: values.tolist() for name, values in by_term.items()} == {"rule": [1.0, 0.5], "judge": [9.0, 2.0]}
    assert reward.score(by_term).tolist() == [3.0 - 2 * 1.5, 1.5 - 2 * 0.5]
    assert reward.raw_score(by_term).tolist() == [3.0 - 18.0, 1.5 - 4.0]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_statistics_without_a_scale_are_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="score statistics"):
        ScoreStatistics(mean, std)


def test_the_score_lies_on_the_last_response_token_and_kl_on_every_one() -> None:
    logprobs = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-2.0, -1.0, -9.0], [-1.0, -3.0, -0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(logprobs - reference, torch.tensor([10.0, 20.0]), mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 10.0, 0.0], [0.0, -0.2, 20.05]]))


def test_an_empty_response_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        token_rewards(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2, dtype=torch.bool), 0.1)
