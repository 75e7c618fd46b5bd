"""Recipes of rnn, encoders and encoder-decoders: what fits together, and what is said where it does not."""

from collections.abc import Callable
from pathlib import Path

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
  spans:
    kind: pretrain
    architecture: {family: encoder_decoder, type: t5, d_model: 32, d_kv: 8, d_ff: 64, num_layers: 1, num_heads: 4}
    tokenizer: {train: bpe, vocab_size: 400, num_sentinels: 4}
    span_corruption: {noise_density: 0.2}
    data: {source: python-docs}
    train: {epochs: 2, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
  spanish:
    kind: finetune
    init_from: spans
    lora: {r: 4, target_modules: [q, v]}
    num_beams: 4
    data: {source: csv, files: [pairs.txt], delimiter: ";", header: [en, es], columns: {prompt: en, completion: es}}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
  exam:
    kind: evaluate
    of: [rnn, chat]
    gates: [{metric: rnn.ngram_perplexity, max: 1000}]
  targets:
    kind: evaluate
    of: [spanish, spans]
    suites: [targets]
    prompts: {source: csv, files: [pairs.txt], delimiter: ";", header: [en, es], columns: {prompt: en, completion: es},
              hold_out: 0.1}
    num_beams: 4
    sequence_length: 64
    gates: [{metric: spanish.chrf, min: 1}]
"""


@pytest.fixture(autouse=True)
def pairs(tmp_path: Path) -> None:
    """Write the file that the recipe names."""
    (tmp_path / "pairs.txt").write_text("go;ve\n" * 9)


def test_the_recipe_is_right(problems_of: Callable[..., str]) -> None:
    assert problems_of(TEXT) == ""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("type: gru", "type: lstn", "did you mean lstm?"),
        ("type: gru, hidden_size: 32", "type: gru, hidden_size: 32, n_head: 4", "unknown key"),
        ("    init_from: rnn\n", "    init_from: rnn\n    lora: {r: 4}\n", "no linear modules that an adapter goes on"),
        ("    init_from: rnn\n", "    init_from: rnn\n    labelled_share: 0.1\n", "labels belong to encoders"),
        ("    init_from: rnn\n", "    init_from: rnn\n    dropout: 0.1\n", "dropout: serves encoders, which learn"),
        ("labelled_share: 0.5", "dropout: 1.0", "stages.kinds.dropout"),
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
        ("of: [rnn, chat]", "of: [rnn, spanish]", "exam.of.1: an encoder-decoder writes targets of sources (found"),
        ("of: [spanish, spans]", "of: [spanish, chat]", "targets.of.1: suite 'targets' measures encoder-decoders"),
        ("suites: [targets]", "suites: [targets, perplexity]", "suite 'targets' measures encoder-decoders; it stands"),
        ("suites: [targets]", "suites: [targets]\n    reward: ./judge", "suite 'targets' takes no reward"),
        ("suites: [targets]", "suites: [generation]", "num_beams (4) says something only with suites: [targets]"),
        ("spanish.chrf", "spanish.ngram_perplexity", "the report of the suites targets has no such metric"),
        ("prompts: {source: csv, files: [pairs.txt]", "prompts: {source: csv, files: [gone.txt]", "gone.txt"),
        (
            "num_sentinels: 4",
            "num_sentinels: 3",
            "tokenizer.num_sentinels: 4 spans are hidden of 64 tokens; the tokenizer has 3 sentinels",
        ),
        ("num_sentinels: 4", "cls_token: a, num_sentinels: 4", "only encoders take it"),
        ("type: t5", "type: t55", "did you mean t5?"),
        ("d_kv: 8, ", "", "stages.spans.architecture.d_kv"),
        ("noise_density: 0.2", "noise_density: 1.2", "stages.spans.span_corruption.noise_density"),
        (
            "    span_corruption: {noise_density: 0.2}",
            "    corruption: {share: 0.2}",
            "hides tokens from family encoder",
        ),
        ("    corruption: {whole_words: true}", "    span_corruption: {}", "hides tokens from family encoder_decoder"),
        ("{epochs: 2, global_batch: 8,", "{tokens: 9999, global_batch: 8,", "counts rows, not tokens"),
        ("{epochs: 2,", "{epochs: 2, packing: true,", "never packed"),
        ("num_beams: 4", "loss_on: all", "writes targets alone"),
        (
            "pseudo_labels: {threshold: 0.9}\n    data: {source: python-docs}",
            "data: {source: text, files: [pairs.txt]}",
            "stages.kinds.data.source: plain text has no labels, which a classifier learns",
        ),
        (
            "pseudo_labels: {threshold: 0.9}\n    data: {source: python-docs}",
            'data: {source: csv, files: [pairs.txt], delimiter: ";", header: [prompt, completion]}',
            "stages.kinds.data.files.0: ",
        ),
        (
            "labelled_share: 0.5",
            "labelled_share: 1.0",
            "stages.kinds.pseudo_labels: every row of python-docs has a label that is used",
        ),
        (
            "threshold: 0.9",
            "warmup_steps: 20",
            "stages.kinds.pseudo_labels.warmup_steps: the rows without a label would never be learnt from; the stage "
            "has 20 steps (found 20); below 20",
        ),
        ("    init_from: words\n", "    init_from: words\n    num_beams: 2\n", "beams search the answers of"),
        ("[q, v]", "[q_proj, v]", "t5 has no linear module of this name"),
        ('delimiter: ";"', 'delimiter: ","', "1 cells, but `header` names 2"),
        ('delimiter: ";"', 'delimiter: ":"', r'delimiter: must be ",", "\t", ";" or "|" (found'),
        ("type: t5, ", "type: bart, ", "d_kv: unknown key (found 8); belongs to type: t5"),
        ("header: [en, es]", "header: [en, en]", "header names 'en' twice"),
        ("completion: es}", "completion: fr}", "no column 'fr' (mapped to completion)"),
        ("{prompt: en, completion: es}", "{text: en}", "needs messages or prompt and completion"),
        ("type: t5, ", "type: bart, ", "stages.spans.architecture"),
        (
            "  exam:\n",
            "  judge:\n    kind: reward\n    init_from: spans\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  exam:\n",
            "a reward stage needs a decoder; this model is of family encoder_decoder",
        ),
        (
            "  exam:\n",
            "  policy:\n    kind: ppo\n    actor: spans\n    reward: ./judge\n    prompts: {source: python-docs}\n"
            "    ppo: {iterations: 1, optimizer: {lr: 1e-3}}\n  exam:\n",
            "a ppo stage needs a decoder; this model is of family encoder_decoder",
        ),
        ("threshold: 0.9", "threshold: 1", "stages.kinds.pseudo_labels.threshold"),
        (
            "  exam:\n",
            "  again:\n    kind: finetune\n    init_from: kinds\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  exam:\n",
            "is a classifier already; a classifier starts from",
        ),
        (
            "  exam:\n",
            "  again:\n    kind: pretrain\n    init_from: kinds\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  exam:\n",
            "stages.again.init_from: is a classifier already; pretraining starts from a pretrained encoder",
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
