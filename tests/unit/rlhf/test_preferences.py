"""Losses of preference optimisation: TRL's numbers on drawn pairs, what is known of them, and weights by the pair.

The numbers are what TRL 1.16's own methods gave in fp64 (`DPOTrainer._compute_loss`, `ORPOTrainer.odds_ratio_loss`,
`CPOTrainer.cpo_loss`, `KTOTrainer._compute_loss`). Where TRL differs: ORPO's likelihood of the chosen answer is there
the mean over all tokens of a batch, the prompt's included; here it is that of the answer, a mean per pair.
"""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from recipes.stages.preference_losses import PreferenceLoss
from rlhf.algorithms.preferences import kto_loss, log_complement, logistic_loss, robust_loss
from rlhf.text.preference_objective import AnswerLogprobs, PreferenceObjective, Referred, Sides, judge
from tests.unit.rlhf.tiny_ppo import tiny_model
from trainers.data.batches import PairBatch, SequenceBatch

PAIRS = Sides(
    logprobs_B2=torch.tensor(
        [[-1.45, -7.666], [-5.814, -2.207], [-5.668, -6.42], [-1.331, -3.15]], dtype=torch.float64
    ),
    reference_B2=torch.tensor(
        [[-3.465, -6.25], [-6.003, -3.868], [-7.198, -10.978], [-1.179, -5.084]], dtype=torch.float64
    ),
    lengths_B2=torch.tensor([[3, 5], [4, 2], [6, 6], [1, 3]]),
)
TRL: list[tuple[dict[str, Any], list[float]]] = [
    ({"name": "dpo", "beta": 0.3}, [0.3054657165, 0.9381279697, 1.2471330920, 1.0542218348]),
    (
        {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1},
        [0.4083957165, 0.8939679697, 1.1562930920, 0.9916418348],
    ),
    ({"name": "hinge", "beta": 0.3}, [0.0, 1.4416, 1.9084, 1.6258]),
    ({"name": "ipo", "beta": 0.3}, [0.5066592400, 6.0020916736, 4.7146884444, 6.0680111111]),
    (
        {"name": "robust", "beta": 0.3, "label_smoothing": 0.1},
        [0.1768032165, 0.9933279697, 1.3606830920, 1.1324468348],
    ),
    (
        {"name": "dpo", "beta": 2.0, "length_normalised": True},
        [0.1381257175, 1.7561071326, 1.3200934521, 1.7783570621],
    ),
    ({"name": "simpo", "beta": 2.0, "gamma": 0.5}, [0.1839455410, 1.4632824673, 0.8255646902, 1.3589615777]),
    ({"name": "orpo", "odds_weight": 0.2}, [0.5149158076, 1.6466740283, 1.0645111024, 1.5141870610]),
]


def loss_of(keys: dict[str, Any]) -> Any:
    return TypeAdapter[Any](PreferenceLoss).validate_python(keys)


@pytest.mark.parametrize(("keys", "wanted"), TRL, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_losses_are_those_of_trl(keys: dict[str, Any], wanted: list[float]) -> None:
    found = judge(loss_of(keys), PAIRS)
    assert found.losses_B.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (
            0.15625,
            [
                *(0.4369166001, 0.5970525237, 0.4780832348, 0.6277227466),
                *(0.2689539092, 0.4276845909, 0.5524883277, 0.4411807967),
            ],
        ),
        (
            0.0,
            [
                *(0.4239778090, 0.5829945556, 0.4646676941, 0.6136776300),
                *(0.2767581073, 0.4354418193, 0.5578718318, 0.4487793975),
            ],
        ),
    ],
)
def test_kto_is_that_of_trl(kl: float, wanted: list[float]) -> None:
    """The chosen answers as desirable ones, the rejected as undesirable."""
    ratios_B = (PAIRS.logprobs_B2 - PAIRS.reference_B2).T.flatten()
    found = kto_loss(ratios_B, torch.arange(8) < 4, kl, 0.3, (1.2, 0.7))
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("keys", [keys for keys, _ in TRL], ids=lambda keys: keys["name"])
def test_every_loss_pulls_the_chosen_answer_up_and_the_rejected_one_down(keys: dict[str, Any]) -> None:
    logprobs_B2 = PAIRS.logprobs_B2[1:].clone().requires_grad_()  # of the first pair the hinge is flat
    sides = Sides(logprobs_B2, PAIRS.reference_B2[1:], PAIRS.lengths_B2[1:])
    judge(loss_of(keys), sides).losses_B.sum().backward()
    assert (logprobs_B2.grad[:, 0] < 0).all()
    assert (logprobs_B2.grad[:, 1] > 0).all()


def test_dpo_by_hand() -> None:
    loss = logistic_loss(torch.tensor([0.0, 10.0, -10.0]).double(), 0.1)
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.e)])


def test_the_mean_over_swapped_labels_is_the_loss_of_the_right_ones() -> None:
    margin = torch.tensor([0.7, -3.0]).double()
    rate = 0.2
    mean = (1 - rate) * robust_loss(margin, 0.5, rate) + rate * robust_loss(-margin, 0.5, rate)
    torch.testing.assert_close(mean, logistic_loss(margin, 0.5))


def test_probabilities_next_to_one_and_to_zero_keep_their_digits() -> None:
    logprobs = torch.tensor([-1e-12, -1e-3, -math.log(2), -40.0], dtype=torch.float64, requires_grad=True)
    found = log_complement(logprobs)
    wanted = [math.log(1e-12), math.log(-math.expm1(-1e-3)), -math.log(2), -math.exp(-40.0)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9)
    found.sum().backward()
    assert logprobs.grad.isfinite().all()
    assert log_complement(torch.zeros(1)).isfinite().all()


def side(*texts: list[int], answers: list[int]) -> SequenceBatch:
    """Rows whose last so many tokens are the answer."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    places = torch.arange(width)[None]
    ends = torch.tensor([len(text) for text in texts])[:, None]
    real = places < ends
    return SequenceBatch(ids, real, real & (places >= ends - torch.tensor(answers)[:, None]))


def rows(*numbers: int) -> Referred:
    """Of three rows these, as a batch; -1 is a filler, which holds what row 0 does."""
    chosen = [[5, 6, 7, 8], [9, 4, 3], [2, 2, 10, 11, 12]], [2, 1, 3]
    rejected = [[5, 6, 1], [9, 4, 13, 14, 15, 16], [2, 2, 3]], [1, 4, 1]
    taken = [max(row, 0) for row in numbers]
    pairs = PairBatch(
        *(
            side(*(texts[row] for row in taken), answers=[sizes[row] for row in taken])
            for texts, sizes in (chosen, rejected)
        ),
        torch.tensor(numbers),
    )
    reference = torch.tensor([[-5.0, -3.0], [-2.0, -11.0], [-9.0, -4.0]])
    return Referred(pairs, reference[taken])


@pytest.mark.parametrize("keys", [keys for keys, _ in TRL], ids=lambda keys: keys["name"])
def test_the_loss_of_a_step_does_not_depend_on_how_its_pairs_are_shared_out(keys: dict[str, Any]) -> None:
    module, objective = AnswerLogprobs(tiny_model(0)), PreferenceObjective(loss_of(keys))

    def step(*batches: Referred) -> tuple[float, float, torch.Tensor]:
        module.zero_grad()
        total = sum(objective.weight(batch) for batch in batches)
        losses = [objective.loss(module, batch).loss_sum / total for batch in batches]
        sum(losses).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        return total, float(sum(losses).detach()), gradient

    count, loss, gradient = step(rows(0, 1, 2))
    for batches in ([rows(2), rows(0, 1)], [rows(1, -1), rows(0, 2), rows(-1)]):
        again = step(*batches)
        assert again[0] == count == 3
        assert again[1] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(again[2], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def logprobs_of(model: Any, text: torch.Tensor) -> torch.Tensor:
    """What a model says of each next token."""
    return model(input_ids=text[None]).logits[0].double().log_softmax(dim=-1)


def test_log_probabilities_are_those_of_the_answers_tokens_alone() -> None:
    model, batch = tiny_model(0), rows(0, 1, 2).rows.joined()
    with torch.no_grad():
        found = AnswerLogprobs(model)(batch)
    for row in range(len(found)):
        text = batch.input_ids_BT[row][batch.attention_mask_BT[row]]
        logprobs = logprobs_of(model, text)
        answer = int(batch.response_mask_BT[row].sum())
        wanted = sum(float(logprobs[place - 1, text[place]]) for place in range(len(text) - answer, len(text)))
        assert float(found[row]) == pytest.approx(wanted, rel=1e-5)


def test_an_answer_to_nothing_counts_from_its_second_token_on() -> None:
    model, batch = tiny_model(0), side([5, 6, 7], [5], answers=[3, 1])
    with torch.no_grad():
        found = AnswerLogprobs(model)(batch)
    logprobs = logprobs_of(model, torch.tensor([5, 6, 7]))
    assert float(found[0]) == pytest.approx(float(logprobs[0, 6] + logprobs[1, 7]), rel=1e-5)
    assert float(found[1]) == 0.0
