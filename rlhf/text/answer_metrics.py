"""What an evaluation says of models that answered the same prompts: metrics by name, and samples side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.comparison import distinct_n, mean_and_std, repeated_share, win_rate
from trainers.evaluation.suite import REFERENCE


@dataclass(frozen=True)
class Answer:
    """One model's response to one prompt; KL against the first model in nats, summed over the response."""

    row: int
    tokens: list[int]
    ended: bool
    kl: float | None = None
    kl_k3: float | None = None
    score: float | None = None
    second_score: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What each term that needs no model gave, by its name."""


@dataclass(frozen=True)
class ModelAnswers:
    """Everything that one model wrote, in the order of the prompts."""

    label: str
    answers: Sequence[Answer]


def generation_metrics(model: ModelAnswers) -> dict[str, float]:
    """Length, end-token rate, variety, rewards by term and KL of one model."""
    answers = model.answers
    responses = [answer.tokens for answer in answers]
    found = {
        "length_mean": sum(map(len, responses)) / len(responses),
        "eos_rate": sum(answer.ended for answer in answers) / len(answers),
        "distinct_2": distinct_n(responses, 2),
        "repetition": repeated_share(responses),
    }
    for name in answers[0].rewards:
        found[f"reward_{name}"] = sum(answer.rewards[name] for answer in answers) / len(answers)
    for name in ("kl", "kl_k3"):
        values = [getattr(answer, name) for answer in answers]
        if all(value is not None for value in values):
            found[name] = sum(values) / len(values)
    return {f"{model.label}.{name}": value for name, value in found.items()}


def comparison_metrics(models: Sequence[ModelAnswers]) -> dict[str, float]:
    """Scores of each model, and of each later one its gain and its win rate against the first.

    The second scorer decides comparisons where there is one; a gain is in deviations of the first model's scores.
    """
    found: dict[str, float] = {}
    first_scores = _scores(models[0], "score")
    start_mean, start_std = mean_and_std(first_scores)
    for model in models:
        mean, std = mean_and_std(_scores(model, "score"))
        found |= {f"{model.label}.score_mean": mean, f"{model.label}.score_sd": std}
        has_second = model.answers[0].second_score is not None
        if has_second:
            mean_second, _ = mean_and_std(_scores(model, "second_score"))
            found[f"{model.label}.second_score_mean"] = mean_second
        if model is models[0]:
            continue
        judge = "second_score" if has_second else "score"
        wins = win_rate(_scores(model, judge), _scores(models[0], judge))
        found |= {
            f"{model.label}.win_rate": wins.rate,
            f"{model.label}.win_rate_low": wins.low,
            f"{model.label}.win_rate_high": wins.high,
        }
        if start_std > 0:
            found[f"{model.label}.score_gain_sd"] = (mean - start_mean) / start_std
    return found


def side_by_side(
    models: Sequence[ModelAnswers],
    prompts: Mapping[int, Mapping[str, Any]],
    texts: Mapping[str, Sequence[str]],
    num_samples: int,
) -> list[dict[str, Any]]:
    """Lines {prompt, model, response, rewards, score, second_score}; the data's own answer to a prompt stands first."""
    lines: list[dict[str, Any]] = []
    for place in range(min(num_samples, len(models[0].answers))):
        prompt = prompts[models[0].answers[place].row]
        if prompt.get("reference"):
            lines.append({"prompt": prompt["text"], "model": REFERENCE, "response": prompt["reference"]})
        for model in models:
            answer = model.answers[place]
            scores = {"score": answer.score, "second_score": answer.second_score}
            lines.append(
                {
                    "prompt": prompt["text"],
                    "model": model.label,
                    "response": texts[model.label][place],
                    "ended": answer.ended,
                    **({"rewards": dict(answer.rewards)} if answer.rewards else {}),
                    **{name: value for name, value in scores.items() if value is not None},
                }
            )
    return lines


def _scores(model: ModelAnswers, which: str) -> list[float]:
    return [float(getattr(answer, which)) for answer in model.answers]
