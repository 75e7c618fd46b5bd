"""Recipes of rnn, encoders and encoder-decoders: what fits together, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

ProblemsOf = Callable[..., list[tuple[str, str]]]

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
  eval:
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


def test_the_recipe_is_right(problems_of: ProblemsOf) -> None:
    assert problems_of(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        ("type: gru", "type: lstn", "unknown-choice", "stages.rnn.architecture.type"),
        (
            "type: gru, hidden_size: 32",
            "type: gru, hidden_size: 32, n_head: 4",
            "unknown-key",
            "stages.rnn.architecture.n_head",
        ),
        ("    init_from: rnn\n", "    init_from: rnn\n    lora: {r: 4}\n", "not-applicable", "stages.chat.lora"),
        (
            "    init_from: rnn\n",
            "    init_from: rnn\n    labelled_share: 0.1\n",
            "not-applicable",
            "stages.chat.labelled_share",
        ),
        ("    init_from: rnn\n", "    init_from: rnn\n    dropout: 0.1\n", "not-applicable", "stages.chat.dropout"),
        ("labelled_share: 0.5", "dropout: 1.0", "out-of-range", "stages.kinds.dropout"),
        (
            "optimizer: {lr: 1e-3}}\n",
            "optimizer: {lr: 1e-3}, packing: false}\n",
            "not-applicable",
            "stages.rnn.train.packing",
        ),
        (
            "optimizer: {lr: 1e-3}}\n",
            "optimizer: {lr: 1e-3}}\n    shard: {gradient_checkpointing: true}\n",
            "not-applicable",
            "stages.rnn.shard.gradient_checkpointing",
        ),
        (
            "vocab_size: 400}",
            "vocab_size: 400}\n    corruption: {share: 0.2}",
            "not-applicable",
            "stages.rnn.corruption",
        ),
        (
            "vocab_size: 400}",
            'vocab_size: 400, cls_token: "<|c|>"}',
            "not-applicable",
            "stages.rnn.tokenizer.cls_token",
        ),
        (', mask_token: "<|mask|>"', "", "missing-special-token", "stages.words.tokenizer.mask_token"),
        ('cls_token: "<|cls|>", ', "", "missing-special-token", "stages.words.tokenizer.cls_token"),
        ('mask_token: "<|mask|>"', 'mask_token: "<|cls|>"', "duplicate-item", "stages.words.tokenizer"),
        ("num_attention_heads: 4", "num_attention_heads: 5", "not-divisible", "stages.words.architecture"),
        ("[query, value]", "[query, values]", "unknown-module", "stages.kinds.lora.target_modules.1"),
        ("init_from: words", "init_from: rnn", "not-applicable", "stages.kinds.labelled_share"),
        ("of: [rnn, chat]", "of: [words]", "unsupported-family", "stages.eval.of.0"),
        ("of: [rnn, chat]", "of: [rnn, spanish]", "tokenizer-mismatch", "stages.eval.of.1"),
        ("of: [spanish, spans]", "of: [spanish, chat]", "unsupported-family", "stages.targets.of.1"),
        ("suites: [targets]", "suites: [targets, perplexity]", "conflicting-keys", "stages.targets"),
        (
            "suites: [targets]",
            "suites: [targets]\n    rewards: {judge: {model: ./judge}}",
            "no-effect",
            "stages.targets",
        ),
        ("suites: [targets]", "suites: [generation]", "no-effect", "stages.targets"),
        ("spanish.chrf", "spanish.ngram_perplexity", "unknown-metric", "stages.targets.gates.0.metric"),
        (
            "prompts: {source: csv, files: [pairs.txt]",
            "prompts: {source: csv, files: [gone.txt]",
            "missing-file",
            "stages.targets.prompts.files.0",
        ),
        (
            "num_sentinels: 4",
            "num_sentinels: 3",
            "too-few-sentinels",
            "stages.spans.tokenizer.num_sentinels",
        ),
        ("num_sentinels: 4", "cls_token: a, num_sentinels: 4", "not-applicable", "stages.spans.tokenizer.cls_token"),
        ("type: t5", "type: t55", "unknown-choice", "stages.spans.architecture.type"),
        ("d_kv: 8, ", "", "missing-key", "stages.spans.architecture.d_kv"),
        ("noise_density: 0.2", "noise_density: 1.2", "out-of-range", "stages.spans.span_corruption.noise_density"),
        (
            "    span_corruption: {noise_density: 0.2}",
            "    corruption: {share: 0.2}",
            "not-applicable",
            "stages.spans.corruption",
        ),
        (
            "    corruption: {whole_words: true}",
            "    span_corruption: {}",
            "not-applicable",
            "stages.words.span_corruption",
        ),
        (
            "{epochs: 2, global_batch: 8,",
            "{tokens: 9999, global_batch: 8,",
            "not-applicable",
            "stages.spans.train.tokens",
        ),
        ("{epochs: 2,", "{epochs: 2, packing: true,", "not-applicable", "stages.spans.train.packing"),
        ("num_beams: 4", "loss_on: all", "not-applicable", "stages.spanish.loss_on"),
        (
            "pseudo_labels: {threshold: 0.9}\n    data: {source: python-docs}",
            "data: {source: text, files: [pairs.txt]}",
            "missing-labels",
            "stages.kinds.data.source",
        ),
        (
            "pseudo_labels: {threshold: 0.9}\n    data: {source: python-docs}",
            'data: {source: csv, files: [pairs.txt], delimiter: ";", header: [prompt, completion]}',
            "missing-column",
            "stages.kinds.data.files.0",
        ),
        (
            "labelled_share: 0.5",
            "labelled_share: 1.0",
            "no-effect",
            "stages.kinds.pseudo_labels",
        ),
        (
            "threshold: 0.9",
            "warmup_steps: 20",
            "warmup-too-long",
            "stages.kinds.pseudo_labels.warmup_steps",
        ),
        (
            "    init_from: words\n",
            "    init_from: words\n    num_beams: 2\n",
            "not-applicable",
            "stages.kinds.num_beams",
        ),
        ("[q, v]", "[q_proj, v]", "unknown-module", "stages.spanish.lora.target_modules.0"),
        ('delimiter: ";"', 'delimiter: ","', "cell-count-mismatch", "stages.spanish.data.files.0"),
        ('delimiter: ";"', 'delimiter: ":"', "unknown-choice", "stages.spanish.data.delimiter"),
        ("type: t5, ", "type: bart, ", "unknown-key", "stages.spans.architecture.d_kv"),
        ("header: [en, es]", "header: [en, en]", "duplicate-item", "stages.spanish.data"),
        ("completion: es}", "completion: fr}", "missing-column", "stages.spanish.data.files.0"),
        ("{prompt: en, completion: es}", "{text: en}", "missing-column", "stages.spanish.data.files.0"),
        ("type: t5, ", "type: bart, ", "missing-key", "stages.spans.architecture.encoder_layers"),
        (
            "  eval:\n",
            "  judge:\n    kind: reward\n    init_from: spans\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  eval:\n",
            "unsupported-family",
            "stages.judge.init_from",
        ),
        (
            "  eval:\n",
            "  policy:\n    kind: rl\n    actor: spans\n    rewards: {judge: {model: ./judge}}\n"
            "    prompts: {source: python-docs}\n"
            "    algorithm: {name: ppo, iterations: 1, optimizer: {lr: 1e-3}}\n  eval:\n",
            "unsupported-family",
            "stages.policy.actor",
        ),
        ("threshold: 0.9", "threshold: 1", "out-of-range", "stages.kinds.pseudo_labels.threshold"),
        (
            "  eval:\n",
            "  again:\n    kind: finetune\n    init_from: kinds\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  eval:\n",
            "wrong-artifact-kind",
            "stages.again.init_from",
        ),
        (
            "  eval:\n",
            "  again:\n    kind: pretrain\n    init_from: kinds\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  eval:\n",
            "wrong-artifact-kind",
            "stages.again.init_from",
        ),
        (
            "  eval:\n",
            "  judge:\n    kind: reward\n    init_from: rnn\n    data: {source: python-docs}\n"
            "    train: {steps: 9, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}\n  eval:\n",
            "unsupported-family",
            "stages.judge.init_from",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    assert (code, field) in problems_of(TEXT, (old, new))
