"""Reference answers: what the data has as the truth, and random tokens of the same length.

What a reward says of a policy's answers means something next to these alone. Shapes: B answers, T tokens.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes.stages.rewards.answers import answer_text
from recipes.stages.rewards.term import Term
from rlhf.text.responses import Responses
from rlhf.text.reward_inputs import encode_response
from trainers.data.encoding import Encoded
from trainers.data.tokenizer import Tokenization


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt's row, its tokens, and those of an answer."""

    row: int
    prompt: list[int]
    answer: list[int]

    @classmethod
    def of(cls, row: int, encoded: Encoded) -> "AnsweredPrompt":
        """The last tokens are the answer."""
        ids = encoded.ids.tolist()
        prompt = len(ids) - int(encoded.response.sum())
        return cls(row, ids[:prompt], ids[prompt:])

    def answered(self, answer: Sequence[int]) -> "AnsweredPrompt":
        """The same prompt with another answer."""
        return AnsweredPrompt(self.row, self.prompt, list(answer))


def ordinary_tokens(tokenization: Tokenization) -> list[int]:
    """Tokens that are not special."""
    return [number for number in range(tokenization.vocab_size) if number not in tokenization.special_ids]


@dataclass(frozen=True)
class Noise:
    """Ordinary tokens, drawn uniformly."""

    ordinary: Sequence[int]
    chance: random.Random

    @classmethod
    def of(cls, tokenization: Tokenization, seed: int) -> "Noise":
        """Every draw follows from the seed and those before it."""
        return cls(ordinary_tokens(tokenization), random.Random(seed))

    def like(self, answered: AnsweredPrompt) -> AnsweredPrompt:
        """The same prompt with noise as long as its answer."""
        return answered.answered([self.chance.choice(self.ordinary) for _ in answered.answer])


def true_answer(record: Mapping[str, Any], rewards: Mapping[str, Term]) -> str | None:
    """The true answer to a prompt: its row's reference or completion, or the column that a term compares with."""
    if isinstance(record.get("reference"), str):
        return str(record["reference"])
    columns = [term.answer_column for term in rewards.values() if term.answer_column is not None]
    return None if not columns else answer_text(record["columns"][columns[0]])


def truly_answered(
    row: int, record: Mapping[str, Any], rewards: Mapping[str, Term], tokenization: Tokenization
) -> AnsweredPrompt | None:
    """A prompt with its true answer; None: it has none."""
    text = true_answer(record, rewards)
    if text is None:
        return None
    found = AnsweredPrompt.of(row, encode_response(record, text, tokenization))
    return found if found.answer else None


def as_responses(answered: Sequence[AnsweredPrompt], pad_id: int) -> Responses:
    """The answers as if a policy had written them, padded on the right."""
    width = max(len(row.prompt) + len(row.answer) for row in answered)
    ids_BT = torch.full((len(answered), width), pad_id)
    real_BT = torch.zeros(len(answered), width, dtype=torch.bool)
    response_BT = real_BT.clone()
    for place, row in enumerate(answered):
        length = len(row.prompt) + len(row.answer)
        ids_BT[place, :length] = torch.tensor([*row.prompt, *row.answer])
        real_BT[place, :length] = True
        response_BT[place, len(row.prompt) : length] = True
    ended_B = torch.ones(len(answered), dtype=torch.bool)
    return Responses(ids_BT, real_BT, response_BT, ended_B, torch.tensor([row.row for row in answered]))
