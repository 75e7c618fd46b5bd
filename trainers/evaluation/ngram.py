"""A counted n-gram model, the baseline of every language model: interpolated modified Kneser-Ney smoothing.

Chen & Goodman (1999), section 4.1.6 of the technical report TR-10-98: the highest order counts occurrences, lower ones
count in how many different contexts a word was seen; three discounts per order; the lowest order is interpolated with
the uniform distribution. Everything is arrays: an n-gram is a number made of the number of its context and its last
token. Documents are padded in front with a token of their own, which is never predicted.

P padded positions, M n-grams of one order, N targets.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from trainers.data.batches import ImageTextBatch, TokenBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.layouts.stream import Stream
from trainers.runtime import distributed

ORDER = 5
MAX_TOKENS = 20_000_000
"""Training tokens that are counted at most, from the beginning of the set."""
ROWS_AT_ONCE = 64
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Where a text is too small to estimate them: no n-gram was seen once, twice, three or four times."""


@dataclass(frozen=True)
class Documents:
    """Tokens of documents, one after the other."""

    tokens_S: np.ndarray
    is_first_S: np.ndarray
    """True at the first token of each."""


@dataclass(frozen=True)
class _Order:
    """What is known of the n-grams of one length; a context's number is that of the n-gram that it is."""

    keys_M: np.ndarray
    """Sorted: number of the context times (vocabulary + 1), plus the last token."""
    discounted_M: np.ndarray
    """Discounted count over the count of the context."""
    backoff_C: np.ndarray
    """Weight of the next lower order in each context; 1 where the context was never followed by anything."""


class KneserNey:
    """Probabilities of the next token after up to `order - 1` tokens of its document."""

    def __init__(self, documents: Documents, vocab_size: int, order: int = ORDER) -> None:
        """Count; takes a second per million tokens."""
        self.vocab_size, self.order = vocab_size, order
        self.num_tokens = len(documents.tokens_S)
        tokens_P, _ = self._pad(documents)
        counted_P = tokens_P != vocab_size
        numbers, keys = _number(tokens_P, vocab_size, order)
        self._orders = [
            _smooth(numbers, keys, tokens_P, counted_P, length, order, vocab_size) for length in range(1, order + 1)
        ]

    def log_probabilities(self, documents: Documents) -> np.ndarray:
        """Return the natural logarithm of the probability of each token [S] after those before it in its document."""
        tokens_P, places_S = self._pad(documents)
        found_P = np.full(len(tokens_P), 1.0 / self.vocab_size)
        context_P = np.zeros(len(tokens_P), dtype=np.int64)
        for order in self._orders:
            key_P = np.where(context_P >= 0, context_P * (self.vocab_size + 1) + tokens_P, -1)
            place_P = np.searchsorted(order.keys_M, key_P).clip(max=len(order.keys_M) - 1)
            is_known_P = order.keys_M[place_P] == key_P
            backoff_P = np.where(context_P >= 0, order.backoff_C[context_P], 1.0)
            found_P = np.where(is_known_P, order.discounted_M[place_P], 0.0) + backoff_P * found_P
            number_P = np.where(is_known_P, place_P, -1)
            context_P = np.concatenate([[-1], number_P[:-1]])
        logs: np.ndarray = np.log(found_P[places_S])
        return logs

    def _pad(self, documents: Documents) -> tuple[np.ndarray, np.ndarray]:
        """Put `order - 1` padding tokens before every document; returns them and where each token went."""
        places_S = np.arange(len(documents.tokens_S)) + documents.is_first_S.cumsum() * (self.order - 1)
        length = len(documents.tokens_S) + int(documents.is_first_S.sum()) * (self.order - 1)
        padded_P = np.full(length, self.vocab_size, dtype=np.int64)
        padded_P[places_S] = documents.tokens_S
        return padded_P, places_S


def count_documents(dataset: Dataset) -> Documents:
    """Return the text of a packed set or a stream, at most `MAX_TOKENS` of it."""
    if dataset.layout is Stream:
        return Documents(dataset.arrays["tokens"][:MAX_TOKENS], dataset.arrays["is_first"][:MAX_TOKENS])
    rows = max(1, MAX_TOKENS // dataset.arrays["input_ids"].shape[1])
    return _flat_documents(dataset.arrays["input_ids"][:rows], dataset.arrays["segment_ids"][:rows])[0]


def negative_log_likelihood(model: KneserNey, batches: Iterable[TokenBatch]) -> tuple[float, int]:
    """Return the sum over the targets of the batches, and how many they are; a target sees its segment alone."""
    total, count = 0.0, 0
    for batch in batches:
        documents, is_real = _flat_documents(batch.input_ids_BT.numpy(), batch.segment_ids_BT.numpy())
        is_target = batch.loss_mask_BT.numpy()[is_real]
        if is_target.any():
            total -= float(model.log_probabilities(documents)[is_target].sum())
            count += int(is_target.sum())
    return total, count


def ngram_perplexity(training_sets: Sequence[Dataset], held_out: Dataset, rows: int | None, vocab_size: int) -> float:
    """Return the perplexity of a model counted on some sets on the targets that a model is measured on.

    Those are of at most `rows` rows as `evaluation_batches` takes them, or of the whole set. Rank 0 counts; collective.
    """
    found: float | None = None
    if distributed.rank() == 0:
        model = KneserNey(joined_documents([count_documents(dataset) for dataset in training_sets]), vocab_size)
        if held_out.layout is Stream:
            assert rows is None, "a stream has no rows"
            total, count = _of_stream(model, held_out)
        else:
            batches = evaluation_batches(held_out, len(held_out) if rows is None else rows, 1, 0, ROWS_AT_ONCE)
            texts = (
                batch.tokens if isinstance(batch, ImageTextBatch) else cast(TokenBatch, batch) for batch in batches
            )
            total, count = negative_log_likelihood(model, texts)
        found = math.exp(total / count) if count else math.inf
    shared: float = distributed.broadcast_json(found)
    return shared


def _of_stream(model: KneserNey, held_out: Dataset) -> tuple[float, int]:
    """Return the same as `negative_log_likelihood`; every token but a document's first is a target."""
    documents = Documents(np.asarray(held_out.arrays["tokens"]), np.asarray(held_out.arrays["is_first"]))
    logs = model.log_probabilities(documents)[~documents.is_first_S]
    return -float(logs.sum()), len(logs)


def joined_documents(parts: Sequence[Documents]) -> Documents:
    """Return the documents of all parts, at most `MAX_TOKENS` tokens of them."""
    tokens_S = np.concatenate([part.tokens_S for part in parts])
    is_first_S = np.concatenate([part.is_first_S for part in parts])
    return Documents(tokens_S[:MAX_TOKENS], is_first_S[:MAX_TOKENS])


def _flat_documents(ids: np.ndarray, segments: np.ndarray) -> tuple[Documents, np.ndarray]:
    is_real = np.asarray(segments) > 0
    is_first = is_real.copy()
    is_first[:, 1:] &= segments[:, 1:] != segments[:, :-1]
    return Documents(np.asarray(ids)[is_real], is_first[is_real]), is_real


def _number(tokens_P: np.ndarray, vocab_size: int, order: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return, for each length from 0 on, the number of the n-gram that ends at each place, and the numbers' keys."""
    numbers = [np.zeros(len(tokens_P), dtype=np.int64)]
    keys = [np.zeros(1, dtype=np.int64)]
    for _length in range(1, order + 1):
        context_P = np.concatenate([[0], numbers[-1][:-1]])
        unique, number_P = np.unique(context_P * (vocab_size + 1) + tokens_P, return_inverse=True)
        numbers.append(number_P)
        keys.append(unique)
    return numbers, keys


def _smooth(
    numbers: list[np.ndarray],
    keys: list[np.ndarray],
    tokens_P: np.ndarray,
    counted_P: np.ndarray,
    length: int,
    order: int,
    vocab_size: int,
) -> _Order:
    """Discount the counts of the n-grams of one length."""
    number_P, num_grams = numbers[length], len(keys[length])
    count_M = np.bincount(number_P[counted_P], minlength=num_grams)
    if length < order:
        longer_P = numbers[length + 1]
        is_longer_counted = np.zeros(len(keys[length + 1]), dtype=bool)
        is_longer_counted[longer_P[counted_P]] = True
        suffix = np.zeros(len(keys[length + 1]), dtype=np.int64)
        suffix[longer_P] = number_P
        contexts_M = np.bincount(suffix[is_longer_counted], minlength=num_grams)
        # An n-gram that begins with padding stands in one context alone: its occurrences count.
        begins_padded_M = np.zeros(num_grams, dtype=bool)
        begin_P = np.concatenate([np.full(length - 1, vocab_size), tokens_P])[: len(tokens_P)]
        begins_padded_M[number_P[begin_P == vocab_size]] = True
        count_M = np.where(begins_padded_M, count_M, contexts_M)
    discounts = np.array([0.0, *_discounts(count_M)])
    context_M = keys[length] // (vocab_size + 1)
    discount_M = discounts[np.minimum(count_M, 3)]
    num_contexts = len(keys[length - 1])
    total_C = np.bincount(context_M, weights=count_M, minlength=num_contexts)
    left_C = np.bincount(context_M, weights=discount_M, minlength=num_contexts)
    is_followed_C = total_C > 0
    divisor_C = np.where(is_followed_C, total_C, 1.0)
    return _Order(
        keys_M=keys[length],
        discounted_M=(count_M - discount_M) / divisor_C[context_M],
        backoff_C=np.where(is_followed_C, left_C / divisor_C, 1.0),
    )


def _discounts(count_M: np.ndarray) -> tuple[float, float, float]:
    """Return the discounts of counts 1, 2 and more: D_c = c - (c + 1) Y n_{c+1} / n_c, Y = n1 / (n1 + 2 n2)."""
    ones, twos, threes, fours = (int((count_M == times).sum()) for times in (1, 2, 3, 4))
    if min(ones, twos, threes, fours) == 0:
        return FALLBACK_DISCOUNTS
    share = ones / (ones + 2 * twos)
    found = (1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos, 3 - 4 * share * fours / threes)
    return found if all(value > 0 for value in found) else FALLBACK_DISCOUNTS
