"""What an evaluation says of answers to the same prompts: metrics by name, and samples side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.stages.suites import BEATS_TRUTH, TRUTH
from rlhf.comparison import WinRate, distinct_n, mean_and_std, repeated_share, win_rate

SCORE = "score"
"""The weighted sum of all terms, as a policy learns it."""


@dataclass(frozen=True)
class Answer:
    """A response to a prompt; KL against the first model in nats, summed over the response."""

    row: int
    tokens: list[int]
    ended: bool
    text: str = ""
    kl: float | None = None
    kl_k3: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What each term of the reward gave, by its name, and their weighted sum."""


@dataclass(frozen=True)
class ModelAnswers:
    """Everything that one model wrote, or that is known, in the order of the prompts."""

    label: str
    answers: Sequence[Answer]
    is_known: bool = False
    """Whether no model wrote them: the truth, and noise."""

    def rewards(self, name: str) -> dict[int, float]:
        """What a term gave each answer, by the prompt's row."""
        return {answer.row: answer.rewards[name] for answer in self.answers}


def generation_metrics(model: ModelAnswers) -> dict[str, float]:
    """Length, variety, repetition and rewards by term; of a model end-token rate and KL as well."""
    answers = model.answers
    responses = [answer.tokens for answer in answers]
    found = {
        "length_mean": sum(map(len, responses)) / len(responses),
        "distinct_2": distinct_n(responses, 2),
        "repetition": repeated_share(responses),
    }
    if not model.is_known:
        found["eos_rate"] = sum(answer.ended for answer in answers) / len(answers)
    for name in answers[0].rewards:
        if name != SCORE:
            found[f"reward_{name}"] = sum(answer.rewards[name] for answer in answers) / len(answers)
    for name in ("kl", "kl_k3"):
        values = [getattr(answer, name) for answer in answers]
        if all(value is not None for value in values):
            found[name] = sum(values) / len(values)
    return {f"{model.label}.{name}": value for name, value in found.items()}


def comparison_metrics(
    models: Sequence[ModelAnswers], known: Sequence[ModelAnswers], weights: Mapping[str, float]
) -> dict[str, float]:
    """Scores of all answers, wins over the first model and over the truth, by each term; a gain is in deviations of
    the first model's scores. By a term with a negative weight the smaller value wins.
    """
    found: dict[str, float] = {}
    start = models[0]
    truth = next((each for each in known if each.label == TRUTH), None)
    start_mean, start_std = mean_and_std(list(start.rewards(SCORE).values()))
    for each in [*models, *known]:
        mean, std = mean_and_std(list(each.rewards(SCORE).values()))
        measured = {"score_mean": mean, "score_sd": std}
        if each is not start and start_std > 0:
            measured["score_gain_sd"] = (mean - start_mean) / start_std
        for name, weight in weights.items():
            sign = -1 if weight < 0 else 1
            if each is not start:
                measured |= _wins(name, each, start, sign)
            if truth is not None and each is not truth:
                measured |= {BEATS_TRUTH.format(name): _wins(name, each, truth, sign)[f"win_rate_{name}"]}
        found |= {f"{each.label}.{name}": value for name, value in measured.items()}
    return found


def _wins(name: str, answers: ModelAnswers, rivals: ModelAnswers, sign: int) -> dict[str, float]:
    """How often a term prefers answers to a rival's, at the prompts that both have."""
    own, other = answers.rewards(name), rivals.rewards(name)
    rows = [row for row in own if row in other]
    wins = win_rate([sign * own[row] for row in rows], [sign * other[row] for row in rows])
    return named_wins(name, wins)


def named_wins(name: str, wins: WinRate) -> dict[str, float]:
    """A win rate by a term, with its interval, as metrics."""
    return {
        f"win_rate_{name}": wins.rate,
        f"win_rate_{name}_low": wins.low,
        f"win_rate_{name}_high": wins.high,
    }


def side_by_side(
    models: Sequence[ModelAnswers],
    known: Sequence[ModelAnswers],
    records: Sequence[Mapping[str, Any]],
    num_samples: int,
) -> list[dict[str, Any]]:
    """Lines {prompt, model, response, rewards, score}; the true answer to a prompt comes first."""
    shown = [*(each for each in known if each.label == TRUTH), *models]
    by_row = [{answer.row: answer for answer in each.answers} for each in shown]
    return [
        {
            "prompt": records[asked.row]["text"],
            "model": each.label,
            "response": answers[asked.row].text,
            "ended": answers[asked.row].ended,
            **_rewards(answers[asked.row]),
        }
        for asked in models[0].answers[:num_samples]
        for each, answers in zip(shown, by_row, strict=True)
        if asked.row in answers
    ]


def _rewards(answer: Answer) -> dict[str, Any]:
    by_term = {name: value for name, value in answer.rewards.items() if name != SCORE}
    return {"rewards": by_term, SCORE: answer.rewards[SCORE]} if by_term else {}
