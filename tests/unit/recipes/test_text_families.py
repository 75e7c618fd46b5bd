"""Recipes of recurrent models and encoders: what fits together, and what is said where it does not."""

from collections.abc import Callable

import pytest

TEXT = """\
name: words
stages:
  rnn:
    kind: pretrain
    architecture: {family: rnn, type: gru, hidden_size: 32}
    tokenizer: {train: bpe, vocab_size: 400}
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
  chat:
    kind: finetune
    init_from: rnn
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
  words:
    kind: pretrain
    architecture: {family: encoder, type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4,
                   intermediate_size: 64, max_position_embeddings: 64}
    tokenizer: {train: bpe, vocab_size: 400, cls_token: "<|cls|>", mask_token: "<|mask|>"}
    corruption: {whole_words: true}
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
  kinds:
    kind: finetune
    init_from: words
    lora: {r: 4, target_modules: [query, value]}
    labelled_share: 0.5
    pseudo_labels: {threshold: 0.9}
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
  exam:
    kind: evaluate
    of: [rnn, chat]
    gates: [{metric: rnn.ngram_perplexity, max: 1000}]
"""


def test_the_recipe_is_right(problems_of: Callable[..., str]) -> None:
    assert problems_of(TEXT) == ""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("type: gru", "type: lstn", "did you mean lstm?"),
        ("type: gru, hidden_size: 32", "type: gru, hidden_size: 32, n_head: 4", "unknown key"),
        ("    init_from: rnn\n", "    init_from: rnn\n    lora: {r: 4}\n", "no linear modules that an adapter goes on"),
        ("    init_from: rnn\n", "    init_from: rnn\n    labelled_share: 0.1\n", "labels belong to encoders"),
        ("optimizer: {lr: 1e-3}}\n", "optimizer: {lr: 1e-3}, packing: false}\n", "reads its text as one stream"),
        (
            "optimizer: {lr: 1e-3}}\n",
            "optimizer: {lr: 1e-3}}\n    shard: {gradient_checkpointing: true}\n",
            "a recurrent model keeps its activations",
        ),
        ("vocab_size: 400}", "vocab_size: 400}\n    corruption: {share: 0.2}", "learns to predict the next token"),
        ("vocab_size: 400}", 'vocab_size: 400, cls_token: "<|c|>"}', "only encoders take it"),
        (', mask_token: "<|mask|>"', "", "stages.words.tokenizer.mask_token: an encoder needs this token"),
        ('cls_token: "<|cls|>", ', "", "stages.words.tokenizer.cls_token: an encoder needs this token"),
        ('mask_token: "<|mask|>"', 'mask_token: "<|cls|>"', "special tokens must differ"),
        ("num_attention_heads: 4", "num_attention_heads: 5", "must divide hidden_size (32); remainder 2"),
        ("[query, value]", "[query, values]", "did you mean value?"),
        ("init_from: words", "init_from: rnn", "labels belong to encoders; this model is of family rnn"),
        ("of: [rnn, chat]", "of: [words]", "predicts no next token"),
        ("threshold: 0.9", "threshold: 1", "stages.kinds.pseudo_labels.threshold"),
        (
            "  exam:\n",
            "  again:\n    kind: finetune\n    init_from: kinds\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  exam:\n",
            "is a classifier already",
        ),
        (
            "  exam:\n",
            "  judge:\n    kind: reward\n    init_from: rnn\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  exam:\n",
            "a reward stage needs a decoder; this model is of family rnn",
        ),
    ],
)
def test_what_does_not_fit_is_said(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    assert said in problems_of(TEXT, (old, new))
