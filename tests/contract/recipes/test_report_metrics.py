"""The metric names that a recipe's gates may use are those that an evaluation reports.

Those of the suite `targets` are compared in tests/integration/training/test_seq2seq_stage.py, where it runs.
"""

from recipes.stages.evaluate import Evaluate
from recipes.stages.suites import NOISE, PERPLEXITY, TRUTH
from rlhf.text.answer_metrics import Answer, ModelAnswers, comparison_metrics, generation_metrics

COUNTED = ("real_words", "ngram_loss")
"""Of every answer, by the text that the chain learnt from."""


def _answers(label: str, scores: list[float], has_kl: bool) -> ModelAnswers:
    kl = 0.1 if has_kl else None
    answers = [
        Answer(row=row, tokens=[1, 2, 3], ended=True, kl=kl, kl_k3=kl, rewards={"judge": score, "score": score})
        for row, score in enumerate(scores)
    ]
    return ModelAnswers(label, answers, is_known=not has_kl)


def test_every_reported_metric_is_known_and_the_other_way_round() -> None:
    suites = ["perplexity", "generation", "comparison"]
    keys = {"kind": "evaluate", "of": ["chat", "policy"], "rewards": {"judge": {"model": "a"}}, "suites": suites}
    models = [_answers("chat", [0.0, 1.0], True), _answers("policy", [1.0, 2.0], True)]
    reported = {"prompts"} | {f"{model.label}.{name}" for model in models for name in PERPLEXITY}
    known = [_answers(label, [2.0, 3.0], False) for label in (TRUTH, NOISE)]
    for model in [*models, *known]:
        reported |= set(generation_metrics(model))
    reported |= set(comparison_metrics(models, known, {"judge": 1.0}))
    reported |= {f"{model.label}.{name}" for model in [*models, *known] for name in COUNTED}
    assert reported == Evaluate.model_validate(keys).metrics()
