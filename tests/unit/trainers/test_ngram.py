"""The counted baseline: probabilities add up to one, and equal a plain dictionary's on the same text."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from trainers.evaluation.ngram import FALLBACK_DISCOUNTS, Documents, KneserNey

V = 7


def documents(seed: int, count: int = 40) -> Documents:
    """Give texts of a skewed chain of tokens."""
    rng = np.random.default_rng(seed)
    tokens, first = [], []
    for _ in range(count):
        length = int(rng.integers(1, 12))
        token = int(rng.integers(V - 1))
        for place in range(length):
            tokens.append(token)
            first.append(place == 0)
            token = (token * 2 + int(rng.integers(3) == 0)) % (V - 1)
    return Documents(np.array(tokens), np.array(first))


def split(found: Documents) -> list[list[int]]:
    """Give the documents one by one."""
    starts = [*np.flatnonzero(found.is_first_S), len(found.tokens_S)]
    return [found.tokens_S[a:b].tolist() for a, b in itertools.pairwise(starts)]


class Plain:
    """The formulas of Chen & Goodman over dictionaries."""

    def __init__(self, texts: list[list[int]], order: int) -> None:
        grams = Counter[tuple[int, ...]]()
        for text in texts:
            padded = [V] * (order - 1) + text
            for end in range(order - 1, len(padded)):
                for length in range(1, order + 1):
                    grams[tuple(padded[end - length + 1 : end + 1])] += 1
        self.order = order
        self.counts = {gram: count for gram, count in grams.items() if len(gram) == order or gram[0] == V}
        before = defaultdict(set)
        for gram in grams:
            if len(gram) > 1:
                before[gram[1:]].add(gram[0])
        for gram, seen in before.items():
            if gram[0] != V:
                self.counts[gram] = len(seen)
        self.discounts = {}
        for length in range(1, order + 1):
            n = Counter(count for gram, count in self.counts.items() if len(gram) == length)
            if min(n[1], n[2], n[3], n[4]) == 0:
                self.discounts[length] = FALLBACK_DISCOUNTS
                continue
            y = n[1] / (n[1] + 2 * n[2])
            d = (1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
            self.discounts[length] = d if min(d) > 0 else FALLBACK_DISCOUNTS

    def probability(self, context: tuple[int, ...], token: int) -> float:
        followed = {gram: count for gram, count in self.counts.items() if gram[:-1] == context}
        lower = self.probability(context[1:], token) if context else 1 / V
        if not followed:
            return lower
        total = sum(followed.values())
        cut = {gram: self.discounts[len(gram)][min(count, 3) - 1] for gram, count in followed.items()}
        gram = (*context, token)
        own = (followed[gram] - cut[gram]) / total if gram in followed else 0.0
        return own + sum(cut.values()) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_the_formula(order: int) -> None:
    training, held_out = documents(0), documents(1, 8)
    plain, found = Plain(split(training), order), KneserNey(training, V, order).log_probabilities(held_out)
    wanted = []
    for text in split(held_out):
        padded = [V] * (order - 1) + text
        for end in range(order - 1, len(padded)):
            context = tuple(padded[end - order + 1 : end])
            wanted.append(math.log(plain.probability(context, padded[end])))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("context", [[], [0], [3, 2, 1], [0, 0, 0, 0, 0], [V - 1, V - 1], [1, V - 1, 5]])
def test_probabilities_add_up_to_one(context: list[int]) -> None:
    model = KneserNey(documents(2), V, 4)
    total = 0.0
    for token in range(V):
        text = Documents(np.array([*context, token]), np.array([True] + [False] * len(context)))
        total += math.exp(model.log_probabilities(text)[-1])
    assert total == pytest.approx(1)


def test_a_longer_context_helps_on_a_text_that_needs_it() -> None:
    tokens = np.array([0, 1, 2, 0, 3, 4] * 60)
    text = Documents(tokens, np.arange(len(tokens)) == 0)
    means = [-KneserNey(text, V, order).log_probabilities(text).mean() for order in (1, 2, 3)]
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.1
