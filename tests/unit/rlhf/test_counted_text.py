"""Answers by the text that a model learnt from: real words, and the loss of an n-gram model after their prompts."""

import numpy as np
import pytest

from recipes.data.tokenizers import TrainTokenizer
from rlhf.text.counted_text import CountedText
from rlhf.text.known_answers import AnsweredPrompt, Noise, ordinary_tokens, true_answer, truly_answered
from rlhf.text.reward_inputs import encode_response
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.packed import Packed
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.evaluation.ngram import Documents

TEXTS = ["A heron eats fish and frogs.", "A goat eats grass and bushes."]
RECORDS = [{"prompt": "A heron", "reference": " eats fish and frogs."}, {"prompt": "A goat", "reference": None}]


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    return train_tokenizer(TrainTokenizer(train="bpe", vocab_size=340), TEXTS * 4)


@pytest.fixture(scope="module")
def counted(tokenization: Tokenization) -> CountedText:
    rows = [[*tokenization.encode(text), tokenization.eos_id] for text in TEXTS]
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int32)
    segments = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=np.int32)
    arrays = {"input_ids": ids, "segment_ids": segments, "loss_mask": segments > 0}
    dataset = Dataset("f" * 64, Packed, BuildReport(2, {"sequences": 2}), arrays)
    found = CountedText.of([dataset], tokenization)
    assert found is not None
    return found


def test_words_are_those_of_the_text(counted: CountedText) -> None:
    assert counted.words == {"a", "heron", "goat", "eats", "fish", "frogs", "grass", "bushes", "and"}
    assert counted.measures(RECORDS, [" eats fish", " eats grxss"])["real_words"] == 0.75
    assert counted.measures(RECORDS[:1], ["..."])["real_words"] == 0.0


def test_only_the_tokens_of_answers_are_counted_after_their_prompts(counted: CountedText) -> None:
    answers = [" eats fish and frogs.", " and and eats"]
    logs: list[float] = []
    for record, answer in zip(RECORDS, answers, strict=True):
        encoded = encode_response(record, answer, counted.tokenization)
        alone = Documents(encoded.ids, np.arange(len(encoded.ids)) == 0)
        logs += counted.ngrams.log_probabilities(alone)[encoded.response].tolist()
    assert counted.measures(RECORDS, answers)["ngram_loss"] == pytest.approx(-np.mean(logs))
    good, bad = (counted.measures(RECORDS[:1], [text])["ngram_loss"] for text in (answers[0], answers[1]))
    assert good < bad


def test_without_text_nothing_is_counted(tokenization: Tokenization) -> None:
    assert CountedText.of([], tokenization) is None


def test_the_truth_and_noise_as_long(tokenization: Tokenization) -> None:
    truth = truly_answered(0, RECORDS[0], {}, tokenization)
    assert truth is not None
    assert truth.answer == [*tokenization.encode(" eats fish and frogs."), tokenization.eos_id]
    assert truly_answered(1, RECORDS[1], {}, tokenization) is None
    assert true_answer(RECORDS[1], {}) is None
    noise = Noise.of(tokenization, 7).like(truth)
    assert (noise.row, noise.prompt, len(noise.answer)) == (0, truth.prompt, len(truth.answer))
    assert set(noise.answer) <= set(ordinary_tokens(tokenization))
    assert not tokenization.special_ids & set(noise.answer)
    assert Noise.of(tokenization, 7).like(truth) == noise != Noise.of(tokenization, 8).like(truth)
    assert isinstance(truth, AnsweredPrompt)
