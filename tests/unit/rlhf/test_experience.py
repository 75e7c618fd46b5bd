"""Responses as gapless rows, their shares over ranks, and keyed draws."""

from dataclasses import replace

import numpy as np
import torch

from rlhf.algorithms.advantages import Credit
from rlhf.algorithms.aggregation import Weights
from rlhf.experience import Experience
from rlhf.iterations import shuffled_rows
from rlhf.policy import ScoredRollouts
from rlhf.text.responses import Responses, draw_keys, repeated_prompts
from rlhf.text.samples import collate, samples_of
from trainers.data.batches import PromptBatch
from trainers.inference.rollouts import Sampled, WeightsVersion, response_uniforms

PROMPTS = PromptBatch(
    torch.tensor([[0, 0, 7], [4, 5, 6]]),
    torch.tensor([[False, False, True], [True, True, True]]),
    torch.tensor([10, 11]),
)
DRAWN = Sampled(
    torch.tensor([[8, 9], [2, 0]]),
    torch.tensor([[True, True], [True, False]]),
    torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
    ("length", "stop"),
    WeightsVersion(0, 0),
)


def joined(prompts: PromptBatch = PROMPTS) -> Responses:
    return collate(samples_of(prompts, [(10, 0), (11, 0)], DRAWN, ["a", "b"], str), pad_id=0)


def test_prompt_and_response_become_one_row_without_gaps() -> None:
    responses = joined()
    assert responses.attention_mask_BT.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert responses.input_ids_BT.tolist() == [[7, 8, 9, 0], [4, 5, 6, 2]]
    assert responses.action_ids == [[8, 9], [2]]
    assert responses.action_mask_BA.tolist() == [[True, True], [True, False]]
    assert (responses.ended_B.tolist(), responses.sample_ids_B.tolist()) == ([False, True], [10, 11])


def test_padding_of_the_prompt_on_either_side_gives_the_same_rows() -> None:
    right = PromptBatch(
        torch.tensor([[7, 0, 0], [4, 5, 6]]),
        torch.tensor([[True, False, False], [True, True, True]]),
        torch.tensor([10, 11]),
    )
    assert torch.equal(joined(right).input_ids_BT, joined().input_ids_BT)


def test_rows_drop_common_padding_only() -> None:
    assert joined().rows([0]).input_ids_BT.tolist() == [[7, 8, 9]]
    assert joined().rows([0, 1]).input_ids_BT.shape == (2, 4)


def test_an_unfinished_response_is_scored_with_the_end_token_that_it_lacks() -> None:
    closed = joined().closed(end_ids=(2,))
    assert closed.input_ids_BT.tolist()[0][:4] == [7, 8, 9, 2]
    assert closed.attention_mask_BT.tolist() == [[True] * 4, [True] * 4]
    assert closed.response_mask_BT[0].tolist() == [False, True, True, True]
    assert closed.input_ids_BT.tolist()[1][:4] == [4, 5, 6, 2]


def test_a_response_that_a_stop_token_ended_is_scored_with_an_end_token() -> None:
    responses = replace(joined(), ended_B=torch.tensor([True, True]))  # 9 stopped the first one
    closed = responses.closed(end_ids=(3, 2))
    assert closed.input_ids_BT.tolist() == [[7, 8, 9, 3], [4, 5, 6, 2]]
    assert responses.closed(end_ids=(3, 9)).input_ids_BT.tolist() == [[7, 8, 9, 0, 0], [4, 5, 6, 2, 3]]


def test_a_micro_batch_is_cut_to_its_own_width() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    scored = ScoredRollouts(table, table, table, table, None, None, torch.tensor([0.5, 0.25]))
    weights = Weights(table, torch.ones(2))
    batch = Experience(joined(), scored, Credit(table, table, 1.0), weights).batch(
        [1], weight_scale=0.5, kl_coef=0.0, actor_learns=True, is_untouched=False
    )
    assert batch.old_logprobs_BA.tolist() == [[3.0]]
    assert batch.weights_BA.tolist() == [[1.5]]
    assert batch.weight == 1.0
    assert batch.sample_ids_B.tolist() == [11]


def test_order_depends_on_its_key_alone() -> None:
    assert shuffled_rows(1, 2, 0, 16) == shuffled_rows(1, 2, 0, 16)
    assert shuffled_rows(1, 2, 0, 16) != shuffled_rows(1, 2, 1, 16)
    assert sorted(shuffled_rows(1, 2, 0, 16)) == list(range(16))


def test_uniforms_belong_to_their_sample_not_to_its_place() -> None:
    together = response_uniforms(3, "rollout", 5, [(7, 0), (8, 0), (8, 1)], 4)
    alone = response_uniforms(3, "rollout", 5, [(8, 0)], 4)
    assert np.array_equal(together[1], alone[0])
    assert not np.array_equal(together[1], together[2])
    assert not np.array_equal(alone, response_uniforms(3, "rollout", 6, [(8, 0)], 4))
    assert ((together >= 0) & (together < 1)).all()


def test_each_prompt_is_repeated_with_a_draw_number() -> None:
    prompts = PromptBatch(torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool), torch.tensor([5, 6]))
    assert repeated_prompts(prompts, 2).input_ids_BP.flatten().tolist() == [1, 1, 2, 2]
    assert draw_keys([5, 6], range(2), 2) == [(5, 0), (5, 1), (6, 0), (6, 1)]


def test_a_prompt_that_comes_again_within_an_iteration_gets_further_draws() -> None:
    rows = [5, 6, 5, 7, 5, 6]  # an iteration that crosses the end of an epoch, or asks more than the set holds
    keys = draw_keys(rows, range(6), 1)
    assert keys == [(5, 0), (6, 0), (5, 1), (7, 0), (5, 2), (6, 1)]
    assert draw_keys(rows, range(3), 2) + draw_keys(rows, range(3, 6), 2) == draw_keys(rows, range(6), 2)
    assert len(set(draw_keys(rows, range(6), 2))) == 12
