"""Measures of answers that need no trained model: by the words and the n-grams of the text that a model learnt from.

S tokens of all answers with their prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.stages.rewards.words import words_of
from rlhf.text.reward_inputs import encode_response
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization
from trainers.evaluation.ngram import Documents, KneserNey, count_documents, joined_documents

MAX_WORD_TOKENS = 2_000_000
"""Tokens of the text whose words are taken, from its beginning."""


@dataclass(frozen=True)
class CountedText:
    """What was counted in a text."""

    tokenization: Tokenization
    words: frozenset[str]
    ngrams: KneserNey

    @classmethod
    def of(cls, training_sets: Sequence[Dataset], tokenization: Tokenization) -> "CountedText | None":
        """Count the text of these sets; None without any."""
        if not training_sets:
            return None
        documents = joined_documents([count_documents(dataset) for dataset in training_sets])
        tokens = documents.tokens_S[:MAX_WORD_TOKENS]
        starts = np.flatnonzero(documents.is_first_S[: len(tokens)])
        texts = (tokenization.decode(part.tolist(), skip_special=True) for part in np.split(tokens, starts[1:]))
        words = frozenset(word for text in texts for word in words_of(text))
        return cls(tokenization, words, KneserNey(documents, tokenization.vocab_size))

    def measures(self, records: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, float]:
        """Share of words that the text holds, and nats a token of the answers, each after its prompt."""
        found = [word for text in texts for word in words_of(text)]
        encoded = [
            encode_response(record, text, self.tokenization) for record, text in zip(records, texts, strict=True)
        ]
        starts = np.cumsum([0, *map(len, encoded)])
        is_first_S = np.zeros(starts[-1], dtype=bool)
        is_first_S[starts[:-1]] = True
        logs_S = self.ngrams.log_probabilities(Documents(np.concatenate([row.ids for row in encoded]), is_first_S))
        is_answer_S = np.concatenate([row.response for row in encoded])
        return {
            "real_words": sum(word in self.words for word in found) / len(found) if found else 0.0,
            "ngram_loss": -float(logs_S[is_answer_S].mean()),
        }
