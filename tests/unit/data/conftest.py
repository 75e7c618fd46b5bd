"""A tiny tokenizer, a store in memory's speed, and a small library with documentation of its own."""

from pathlib import Path

import pytest

from recipes.data.tokenizers import TrainTokenizer
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.store.store import Store

WORDS = "Return the sum of two numbers. What does math.add(a, b) do? Open a file and read its lines into a list."


@pytest.fixture(scope="session")
def tokenization() -> Tokenization:
    return train_tokenizer(TrainTokenizer(train="bpe", vocab_size=320), [WORDS, WORDS])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))
