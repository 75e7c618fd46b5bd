"""A language model as a judge of two answers: asked in both orders, so that preferring what stands first cancels."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from recipes.errors import StageError
from recipes.stages.rewards.judge import Choice, GenerativeJudge, choice_of
from rlhf.rewards.endpoint import post_repeatedly

Ask = Callable[[Sequence[str]], Sequence[str]]
"""What a model answers to questions."""
WORTH: dict[Choice, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True, slots=True)
class Preference:
    """What a judge said of an answer and its rival, in both orders."""

    shown_first: Choice | None
    """With the answer first; None: no verdict."""
    shown_second: Choice | None
    """With the rival first."""

    @property
    def value(self) -> float:
        """1: the answer is better, 0.5: a tie, opposite verdicts or none at all, 0: the rival is."""
        found = [] if self.shown_first is None else [WORTH[self.shown_first]]
        found += [] if self.shown_second is None else [1 - WORTH[self.shown_second]]
        return sum(found) / len(found) if found else 0.5

    @property
    def unparsed(self) -> float:
        """Share of the two questions without a verdict."""
        return (self.shown_first, self.shown_second).count(None) / 2

    @property
    def first_shown(self) -> float:
        """How far what stands first is preferred: 0.5 is no bias, 1 always the first."""
        found = [WORTH[choice] for choice in (self.shown_first, self.shown_second) if choice is not None]
        return sum(found) / len(found) if found else 0.5


@dataclass
class Judge:
    """A judge that can be asked; equal answers are a tie without a question."""

    term: GenerativeJudge
    ask: Ask
    last: list[Preference] = field(default_factory=list)
    """Of the answers judged last as a term of a reward."""

    def compare(self, prompts: Sequence[Any], answers: Sequence[str], rivals: Sequence[str]) -> list[Preference]:
        """Compare each answer with its rival."""
        rows = list(zip(map(prompt_text, prompts), answers, rivals, strict=True))
        questions = [
            self.term.question(prompt, *order)
            for prompt, own, other in rows
            if own.strip() != other.strip()
            for order in ((own, other), (other, own))
        ]
        said = iter(self.ask(questions))
        found = []
        for _, own, other in rows:
            if own.strip() == other.strip():
                found.append(Preference("tie", "tie"))
            else:
                found.append(Preference(choice_of(next(said)), choice_of(next(said))))
        return found

    def values(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        """How far each response is preferred to the answer of its prompt's row."""
        answers = [self.term.answer(record["columns"]) for record in records]
        self.last = self.compare([record["prompt"] for record in records], texts, answers)
        return [each.value for each in self.last]

    def measured(self, name: str) -> list[float]:
        """One of the term's measures of the responses judged last."""
        return [getattr(each, name) for each in self.last]


def endpoint_judge(term: GenerativeJudge) -> Ask:
    """Ask an OpenAI-compatible endpoint, without sampling; raises StageError after the last repetition."""
    address = f"{term.judge.rstrip('/')}/chat/completions"
    headers = {}
    if term.key_from is not None:
        if term.key_from not in os.environ:
            raise StageError(f"{term.judge}: the environment variable {term.key_from} (key_from) is not set here")
        headers["Authorization"] = f"Bearer {os.environ[term.key_from]}"

    def ask_one(question: str) -> str:
        body = {
            "model": term.served_as,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": term.max_new_tokens,
            "temperature": 0,
        }
        answered = post_repeatedly(address, json.dumps(body).encode(), term, headers)
        try:
            said = answered["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise StageError(f"{address}: no choices[0].message.content in {str(answered)[:200]!r}") from None
        return said if isinstance(said, str) else ""

    def ask(questions: Sequence[str]) -> list[str]:
        with ThreadPoolExecutor(term.parallel) as pool:
            return list(pool.map(ask_one, questions))

    return ask


def prompt_text(prompt: Any) -> str:
    """A prompt, or its messages, as text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
