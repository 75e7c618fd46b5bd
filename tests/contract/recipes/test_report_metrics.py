"""The metric names that a recipe's gates may use are those that an evaluation reports.

Those of the suite `targets` are compared in tests/integration/training/test_seq2seq_stage.py, where it runs.
"""

from recipes.stages.evaluate import Evaluate
from recipes.stages.suites import PERPLEXITY
from rlhf.text.answer_metrics import Answer, ModelAnswers, comparison_metrics, generation_metrics


def _answers(label: str, scores: list[float], has_kl: bool) -> ModelAnswers:
    answers = [
        Answer(row=row, tokens=[1, 2, 3], ended=True, kl=0.1, kl_k3=0.1, score=score, second_score=score)
        if has_kl
        else Answer(row=row, tokens=[1, 2, 3], ended=True, score=score, second_score=score)
        for row, score in enumerate(scores)
    ]
    return ModelAnswers(label, answers)


def test_every_reported_metric_is_known_and_the_other_way_round() -> None:
    suites = ["perplexity", "generation", "comparison"]
    keys = {"kind": "evaluate", "of": ["chat", "policy"], "reward": "a", "second_scorer": "b", "suites": suites}
    models = [_answers("chat", [0.0, 1.0], True), _answers("policy", [1.0, 2.0], True)]
    reported = {"prompts"} | {f"{model.label}.{name}" for model in models for name in PERPLEXITY}
    for model in models:
        reported |= set(generation_metrics(model))
    reported |= set(comparison_metrics(models))
    assert reported == Evaluate.model_validate(keys).metrics()
