"""Metrics of an evaluation by name, its gates, and the samples side by side."""

from typing import Any

import pytest

from recipes.errors import RequestError
from recipes.stages.evaluate import Bound
from recipes.stages.suites import noise_findings, report_labels
from rlhf.text.answer_metrics import (
    Answer,
    ModelAnswers,
    comparison_metrics,
    generation_metrics,
    side_by_side,
)
from rlhf.text.answers import shared_prompts
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.prompts import Prompts
from trainers.evaluation.evaluate_stage import failed_bounds


def answer(row: int, tokens: list[int], ended: bool, judge: float, second: float, **given: Any) -> Answer:
    rewards = {"judge": judge, "second": second, "score": judge}
    return Answer(row, tokens, ended, **given, rewards=rewards)


def models() -> list[ModelAnswers]:
    start = [
        answer(3, [1, 2], True, 1.0, 5.0, kl=0.0, kl_k3=0.0),
        answer(1, [1, 2, 3], False, 3.0, 5.0, kl=0.0, kl_k3=0.0),
    ]
    after = [answer(3, [4], True, 4.0, 6.0, kl=0.5, kl_k3=0.25), answer(1, [5, 6], True, 4.0, 4.0, kl=1.5, kl_k3=0.75)]
    return [ModelAnswers("chat", start), ModelAnswers("policy", after)]


def known() -> list[ModelAnswers]:
    """The prompt of row 1 has no true answer."""
    truth = ModelAnswers("truth", [answer(3, [7, 8], True, 3.0, 9.0, text="true")], is_known=True)
    noise = [answer(3, [9, 9], True, 3.5, 0.0), answer(1, [9, 8], True, 0.0, 0.0)]
    return [truth, ModelAnswers("random_tokens", noise, is_known=True)]


WEIGHTS = {"judge": 1.0, "second": 0.0}


def test_generation_by_hand() -> None:
    found = generation_metrics(models()[1])
    assert found["policy.length_mean"] == 1.5
    assert found["policy.eos_rate"] == 1.0
    assert found["policy.distinct_2"] == 1.0
    assert found["policy.kl"] == 1.0
    assert found["policy.kl_k3"] == 0.5
    assert found["policy.reward_second"] == 5.0
    assert generation_metrics(models()[0])["chat.eos_rate"] == 0.5
    assert "truth.eos_rate" not in generation_metrics(known()[0])


def test_kl_is_left_out_where_tokenizers_differ() -> None:
    assert "m.kl" not in generation_metrics(ModelAnswers("m", [Answer(0, [1], True)]))
    right = [Answer(row, [1], True, rewards={"right": value}) for row, value in enumerate((1.0, 0.0, 0.0, 1.0))]
    assert generation_metrics(ModelAnswers("m", right))["m.reward_right"] == 0.5


def test_comparison_by_hand() -> None:
    found = comparison_metrics(models(), known(), WEIGHTS)
    assert found["chat.score_mean"] == 2.0
    assert found["chat.score_sd"] == 1.0
    assert found["policy.score_gain_sd"] == pytest.approx(2.0)
    assert (found["policy.win_rate_judge"], found["policy.win_rate_second"]) == (1.0, 0.5)
    assert (found["random_tokens.win_rate_judge"], found["truth.win_rate_judge"]) == (0.5, 1.0)
    assert "chat.win_rate_judge" not in found


def test_the_truth_is_a_rival_where_it_exists() -> None:
    found = comparison_metrics(models(), known(), WEIGHTS)
    assert (found["policy.beats_truth_judge"], found["policy.beats_truth_second"]) == (1.0, 0.0)
    assert found["random_tokens.beats_truth_judge"] == 1.0
    assert "truth.beats_truth_judge" not in found
    (called_out,) = noise_findings(found)
    assert called_out.startswith("judge ")
    assert not any("beats_truth" in name for name in comparison_metrics(models(), known()[1:], WEIGHTS))


def test_the_smaller_value_of_a_penalty_wins() -> None:
    found = comparison_metrics(models(), known(), {"judge": -1.0})
    assert (found["policy.win_rate_judge"], found["random_tokens.beats_truth_judge"]) == (0.0, 0.0)


def test_labels_are_metric_names_and_differ() -> None:
    references = [
        "chat",
        "policy.critic",
        "./runs/My-Model",
        "hf://org/Some.Model@main",
        "store://best",
        "store://best",
        "truth",
    ]
    labels = report_labels(references)
    assert labels == ["chat", "policy_critic", "my_model", "some_model", "best", "best_n2", "truth_n2"]
    for label in labels:
        Bound(metric=f"{label}.win_rate_judge", min=0.5)


def test_gates_name_what_they_missed() -> None:
    metrics = {"policy.win_rate_judge": 0.5, "policy.kl": 9.0}
    gates = [
        Bound(metric="policy.win_rate_judge", min=0.6),
        Bound(metric="policy.kl", max=8.0),
        Bound(metric="policy.kl", min=1.0),
        Bound(metric="policy.perplexity", max=1.0),
    ]
    reasons = failed_bounds(gates, metrics)
    assert [reason.split()[0] for reason in reasons] == ["policy.win_rate_judge", "policy.kl", "there"]


def test_samples_stand_side_by_side_with_the_true_answer() -> None:
    records = [{"text": f"Q{row}"} for row in range(4)]
    lines = side_by_side(models(), known(), records, num_samples=2)
    assert [(line["prompt"], line["model"]) for line in lines] == [
        ("Q3", "truth"), ("Q3", "chat"), ("Q3", "policy"), ("Q1", "chat"), ("Q1", "policy")
    ]  # fmt: skip
    assert lines[0]["response"] == "true"
    assert (lines[2]["score"], lines[2]["rewards"]) == (4.0, {"judge": 4.0, "second": 6.0})


def prompt_set(digest: str, prompts: dict[str, Any]) -> Dataset:
    records = [{"id": id_, "prompt": prompt, "text": str(prompt)} for id_, prompt in prompts.items()]
    return Dataset(digest * 64, Prompts, BuildReport(len(records), {"sequences": len(records)}), {}, records=records)


def test_models_of_different_tokenizers_answer_the_same_prompts() -> None:
    """A set of another tokenizer has other rows: it lacks prompts that are too long, and may hold turns, not text."""
    asked = {f"a.jsonl:{number}": f"question {number}" for number in range(40)}
    turns = {id_: [{"role": "user", "content": text}] for id_, text in reversed(asked.items()) if "7" not in id_}
    plain, chat = prompt_set("a", asked), prompt_set("b", turns)
    first, again, other = shared_prompts([plain, plain, chat], 20, seed=3)
    assert first == again
    assert len(first) == len(set(first)) == 20
    ids = [plain.records[row]["id"] for row in first]
    assert ids == [chat.records[row]["id"] for row in other]
    (alone,) = shared_prompts([plain], 40, seed=3)
    assert first == [row for row in alone if "7" not in plain.records[row]["id"]][:20]
    everything, _ = shared_prompts([plain, chat], 1000, seed=3)
    assert len(everything) == len(turns)
    with pytest.raises(RequestError, match=r"^prompts: .*`of`"):
        shared_prompts([plain, prompt_set("c", {"b.jsonl:1": "question 1"})], 20, seed=3)
