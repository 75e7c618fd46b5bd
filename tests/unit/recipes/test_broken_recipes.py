# ruff: noqa: E501 - one line a case
"""Classes of broken recipe: each is refused with the file, the line, the field and what would be right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.inputs.data_check import DataCheck, load_checked
from recipes.errors import Problem, RecipeError
from recipes.loading.load import check_file
from recipes.problem_codes import Code


class Broken(NamedTuple):
    """One broken recipe: an edit of the chain's text, and the code and field of the finding it must give."""

    code: str
    old: str
    new: str
    field: str
    at: str = ""
    """Text of the line that must be named; the edited line by default."""


BROKEN = [
    # unknown key
    Broken("unknown-key", "      tokens: 100_000", "      tokens: 9\n      stpes: 3", "stages.base.train.stpes", "stpes"),
    Broken("unknown-key", "seed: 3", "seed: 3\nsede: 4", "sede", "sede"),
    Broken("unknown-key", "    shard: {zero: 2,", "    lr: 1\n    shard: {zero: 2,", "stages.base.lr", "lr: 1\n"),
    Broken("unknown-key", "lora: {r: 8,", "lora: {rank: 8,", "stages.chat.lora.rank"),
    Broken("unknown-key", "hidden_size: 64", "hidden_size: 64\n      vocab_size: 9", "stages.base.architecture.vocab_size", "vocab_size: 9"),
    Broken("unknown-key", "{workers: 2,", "{workrs: 2,", "cluster.workrs"),
    # missing key
    Broken("missing-key", "      global_batch: 8\n      sequence_length: 64\n      optimizer: {lr: 1e-3}\n      schedule", "      sequence_length: 64\n      optimizer: {lr: 1e-3}\n      schedule", "stages.base.train.global_batch", "    train:\n"),
    Broken("missing-key", "    actor: chat\n", "", "stages.policy.actor", "  policy:"),
    Broken("missing-key", "optimizer: {lr: 1e-4}", "optimizer: {}", "stages.policy.algorithm.optimizer.lr"),
    Broken("missing-key", "    kind: reward\n", "", "stages.judge.kind", "  judge:"),
    Broken("missing-key", "name: chain\n", "", "name", "seed: 3"),
    # wrong type
    Broken("wrong-type", "num_prompts: 16", "num_prompts: many", "stages.eval.num_prompts"),
    Broken("wrong-type", "num_prompts: 16", "num_prompts: '16'", "stages.eval.num_prompts"),
    Broken("wrong-type", "of: [chat, policy]", "of: chat", "stages.eval.of"),
    Broken("wrong-type", "lora: {r: 8,", "lora: {dora: yes, r: 8,", "stages.chat.lora.dora"),
    Broken("wrong-type", "optimizer: {lr: 1e-4}", "optimizer: 1e-4", "stages.policy.algorithm.optimizer"),
    Broken("wrong-type", "zero: 2", "zero: true", "stages.base.shard.zero"),
    Broken("wrong-type", "iterations: 4", "iterations: 12:30", "stages.policy.algorithm.iterations"),
    # out of range
    Broken("out-of-range", "optimizer: {lr: 1e-4}", "optimizer: {lr: 0}", "stages.policy.algorithm.optimizer.lr"),
    Broken("out-of-range", "kl_coef: 0.05", "kl_coef: -0.1", "stages.policy.algorithm.kl_coef"),
    Broken("out-of-range", "num_hidden_layers: 2", "num_hidden_layers: 10_000", "stages.base.architecture.num_hidden_layers"),
    Broken("out-of-range", "hold_out: 0.1}", "hold_out: 1.5}", "stages.chat.data.hold_out"),
    Broken("out-of-range", "optimizer: {lr: 1e-4}", "optimizer: {lr: 1, betas: [0.9, 1.0]}", "stages.policy.algorithm.optimizer.betas.1"),
    Broken("wrong-length", "of: [chat, policy]", "of: []", "stages.eval.of"),
    # unknown choice
    Broken("unknown-choice", "kind: reward", "kind: rewrad", "stages.judge.kind"),
    Broken("unknown-choice", "type: llama", "type: lama", "stages.base.architecture.type"),
    Broken("unknown-choice", "precision: fp32", "precision: fp16", "stages.base.shard.precision"),
    Broken("unknown-choice", "{source: csv,", "{source: cvs,", "stages.judge.data.source"),
    Broken("unknown-choice", "zero: 2", "zero: 4", "stages.base.shard.zero"),
    Broken("unknown-choice", "suites: [perplexity,", "suites: [perplexty,", "stages.eval.suites.0"),
    # not YAML that a recipe may use
    Broken("duplicate-key", "seed: 3", "seed: 3\nseed: 4", "seed", "seed: 4"),
    Broken("unsupported-yaml", "seed: 3", "seed: &a 3", "seed"),
    Broken("unsupported-yaml", "seed: 3", "seed: !!python/object/apply:os.system [x]", "seed"),
    Broken("unsupported-number", "seed: 3", "seed: 0123", "seed"),
    Broken("invalid-yaml", "seed: 3", "seed: [3", "", "cluster:"),
    Broken("invalid-yaml", "seed: 3", "\tseed: 3", ""),
    Broken("unsupported-number", "kl_coef: 0.05", "kl_coef: .nan", "stages.policy.algorithm.kl_coef"),
    # stage that is not there
    Broken("unknown-stage", "init_from: base", "init_from: bass", "stages.chat.init_from"),
    Broken("unknown-stage", "{model: judge}}\n    prompts", "{model: juge}}\n    prompts", "stages.policy.rewards.judge.model"),
    Broken("unknown-choice", "{model: judge}}\n    prompts", "{rule: numbr}}\n    prompts", "stages.policy.rewards.judge.rule"),
    Broken("wrong-type", "{model: judge}}\n    prompts", "{weight: 2}}\n    prompts", "stages.policy.rewards.judge"),
    Broken("invalid-format", "{model: judge}}\n    prompts", "{rule: regex, pattern: '('}}\n    prompts", "stages.policy.rewards.judge.pattern"),
    Broken("invalid-format", "{judge: {model: judge}}\n    prompts", "{Judge: {model: judge}}\n    prompts", "stages.policy.rewards.Judge"),
    Broken("conflicting-keys", "{judge: {model: judge}}\n    prompts", "{judge: {model: judge}, other: {model: judge}}\n    prompts", "stages.policy.rewards.other.model"),
    Broken("no-effect", "{model: judge}}\n    prompts", "{model: judge, weight: 0}}\n    prompts", "stages.policy.rewards"),
    Broken("unknown-stage", "of: [chat, policy]", "of: [chat, polcy]", "stages.eval.of.1"),
    Broken("unknown-stage", "init_from: chat", "init_from: zzz", "stages.judge.init_from"),
    # circle
    Broken("stage-cycle", "init_from: base", "init_from: policy", "stages.policy.actor", "actor: chat"),
    Broken("stage-cycle", "init_from: base", "init_from: chat", "stages.chat.init_from"),
    Broken("stage-cycle", "actor: chat", "actor: policy", "stages.policy.actor"),
    # wrong kind of artifact, or part
    Broken("wrong-artifact-kind", "{model: judge}}\n    prompts", "{model: chat}}\n    prompts", "stages.policy.rewards.judge.model"),
    Broken("wrong-artifact-kind", "of: [chat, policy]", "of: [chat, judge]", "stages.eval.of.1"),
    Broken("wrong-artifact-kind", "init_from: chat", "init_from: eval", "stages.judge.init_from"),
    Broken("wrong-artifact-kind", "of: [chat, policy]", "of: [chat, policy.critic]", "stages.eval.of.1"),
    Broken("unknown-output", "of: [chat, policy]", "of: [chat, policy.actr]", "stages.eval.of.1"),
    Broken("wrong-artifact-kind", "lora: {r: 8,", "merge: false\n    lora: {r: 8,", "stages.judge.init_from", "init_from: chat"),
    # reference that cannot be read
    Broken("invalid-reference", "init_from: base", "init_from: hf://org/name", "stages.chat.init_from"),
    Broken("invalid-reference", "init_from: base", "init_from: https://example.org/model", "stages.chat.init_from"),
    Broken("invalid-reference", "init_from: base", "init_from: ~/model", "stages.chat.init_from"),
    Broken("invalid-reference", "init_from: base", "init_from: store://x y", "stages.chat.init_from"),
    Broken("invalid-reference", "init_from: base", "init_from: $(touch x)", "stages.chat.init_from"),
    # batches that do not divide
    Broken("batch-not-divisible", "      global_batch: 8", "      global_batch: 9", "stages.base.train.global_batch"),
    Broken("batch-not-divisible", "{workers: 2,", "{workers: 3,", "stages.base.train.global_batch", "      global_batch: 8"),
    Broken("batch-not-divisible", "micro_batch: auto", "micro_batch: 3", "stages.base.shard.micro_batch"),
    Broken("batch-not-divisible", "mini_batches: 2", "mini_batches: 3", "stages.policy.algorithm.mini_batches"),
    Broken("batch-not-divisible", "{prompts_per_iteration: 8,", "{prompts_per_iteration: 7, samples_per_prompt: 2,", "stages.policy.rollout.prompts_per_iteration"),
    Broken("batch-not-divisible", "mini_batches: 2", "mini_batches: 8", "stages.policy.rollout.prompts_per_iteration", "prompts_per_iteration"),
    Broken("batch-not-divisible", "{prompts_per_iteration: 8,", "{prompts_per_iteration: 7, samples_per_prompt: 4,", "stages.policy.rollout.prompts_per_iteration"),
    Broken("batch-not-divisible", "mini_batches: 2", "mini_batches: 6", "stages.policy.algorithm.mini_batches"),
    # algorithms
    Broken("unknown-choice", "name: ppo", "name: grop", "stages.policy.algorithm.name"),
    Broken("missing-key", "      name: ppo\n", "", "stages.policy.algorithm.name", "    algorithm:"),
    Broken("unknown-key", "name: ppo", "nmae: ppo", "stages.policy.algorithm.nmae"),
    Broken("unknown-key", "kl_coef: 0.05", "max_ratio: 4", "stages.policy.algorithm.max_ratio"),
    Broken("conflicting-keys", "kl_coef: 0.05", "kl_estimator: k3", "stages.policy.algorithm.kl_estimator"),
    Broken("conflicting-keys", "kl_coef: 0.05", "kl_in: loss\n      kl_estimator: k1", "stages.policy.algorithm.kl_estimator", "kl_estimator"),
    Broken("too-few-samples", "name: ppo", "name: grpo", "stages.policy.rollout.samples_per_prompt", "    rollout: {prompts_per_iteration"),
    # longer than the model
    Broken("sequence-too-long", "      sequence_length: 64", "      sequence_length: 256", "stages.base.train.sequence_length"),
    Broken("sequence-too-long", "max_new_tokens: 32}\n    algorithm", "max_new_tokens: 99}\n    algorithm", "stages.policy.rollout.max_new_tokens"),
    Broken("sequence-too-long", "max_new_tokens: 32}\n    algorithm", "max_new_tokens: 64}\n    algorithm", "stages.policy.rollout.max_new_tokens"),
    Broken("sequence-too-long", "    sequence_length: 64\n    sampling", "    sequence_length: 129\n    sampling", "stages.eval.sequence_length"),
    Broken("sequence-too-long", "max_position_embeddings: 128", "max_position_embeddings: 32", "stages.chat.train.sequence_length", "steps: 20\n      global_batch: 8\n      sequence_length: 64"),
    # steps
    Broken("conflicting-keys", "tokens: 100_000", "tokens: 100_000\n      steps: 5", "stages.base.train", "    train:\n"),
    Broken("warmup-too-long", "warmup_steps: 5", "warmup_steps: 500", "stages.base.train.schedule.warmup_steps"),
    Broken("warmup-too-long", "kl_coef: 0.05", "critic: {warmup: 4}", "stages.policy.algorithm.critic.warmup"),
    Broken("warmup-too-long", "kl_coef: 0.05", "schedule: {warmup_steps: 16}", "stages.policy.algorithm.schedule.warmup_steps"),
    Broken("invalid-format", "kl_coef: 0.05", "save_every: 5 steps", "stages.policy.algorithm.save_every"),
    Broken("invalid-format", "global_batch: 8\n      sequence_length: 64", "global_batch: 8\n      save_every: 5 iterations\n      sequence_length: 64", "stages.base.train.save_every"),
    Broken("missing-key", "      tokens: 100_000\n", "", "stages.base.train", "    train:\n"),
    # architecture that does not fit together
    Broken("not-divisible", "num_attention_heads: 4", "num_attention_heads: 6", "stages.base.architecture", "architecture:"),
    Broken("not-divisible", "num_key_value_heads: 2", "num_key_value_heads: 3", "stages.base.architecture", "architecture:"),
    Broken("missing-key", "type: llama", "type: llama\n      rope_parameters: {rope_type: linear}", "stages.base.architecture.rope_parameters", "rope_parameters"),
    Broken("unknown-module", "target_modules: [q_proj, v_proj]", "target_modules: [q_proj, c_attn]", "stages.chat.lora.target_modules.1"),
    # tokens that the tokenizer does not know
    Broken("unknown-token", "max_new_tokens: 32}\n    algorithm", "max_new_tokens: 32, stop_tokens: ['<|stop|>']}\n    algorithm", "stages.policy.rollout.stop_tokens.0"),
    Broken("duplicate-item", "vocab_size: 512", "vocab_size: 512\n      pad_token: <|end|>", "stages.base.tokenizer", "tokenizer:"),
    Broken("split-special-token", "vocab_size: 512", "vocab_size: 512\n      special_tokens: ['<|user|>', '<|system|>']", "stages.base.tokenizer.special_tokens", "special_tokens"),
    Broken("vocabulary-too-small", "vocab_size: 512", "vocab_size: 300\n      special_tokens: [" + ", ".join(f"t{n}" for n in range(60)) + "]", "stages.base.tokenizer.vocab_size", "vocab_size"),
    Broken("invalid-chat-template", "vocab_size: 512", "vocab_size: 512\n      chat_template: '{% for m in messages %}'", "stages.base.tokenizer.chat_template", "chat_template"),
    # data files
    Broken("missing-file", "rows/chat.jsonl", "rows/chta.jsonl", "stages.chat.data.files.0"),
    Broken("missing-file", "rows/chat.jsonl", "rows/*.json", "stages.chat.data.files.0"),
    Broken("invalid-data-format", "rows/chat.jsonl", "rows/pairs.csv", "stages.chat.data.files.0"),
    Broken("invalid-path", "rows/chat.jsonl", "rows", "stages.chat.data.files.0"),
    Broken("invalid-data-format", "{source: jsonl, files: [rows/chat.jsonl]", "{source: parquet, files: [rows/chat.jsonl]", "stages.chat.data.files.0"),
    Broken("missing-column", "files: [rows/pairs.csv]", "columns: {chosen: good}, files: [rows/pairs.csv]", "stages.judge.data.files.0"),
    Broken("missing-column", "{source: csv, files: [rows/pairs.csv]", "{source: text, files: [rows/text.txt]", "stages.judge.data.files.0"),
    Broken("missing-revision", "{source: jsonl, files: [rows/chat.jsonl], hold_out: 0.1}", "{source: datasets, path: org/name, hold_out: 0.1}", "stages.chat.data.path"),
    Broken("missing-held-out", "files: [rows/pairs.csv], hold_out: 0.1", "files: [rows/pairs.csv]", "stages.judge.data"),
    Broken("out-of-range", "part: 1/2", "part: 3/2", "stages.policy.prompts"),
    # placement that excludes itself
    Broken("no-effect", "zero: 2", "engine: plain, zero: 2", "stages.base.shard", "shard:"),
    Broken("unmet-requirement", "zero: 2", "zero: 0, offload: cpu", "stages.base.shard.offload"),
    Broken("conflicting-keys", "    rewards: {judge: {model: judge}}\n    prompts:", "    rewards: {judge: {model: judge}}\n    lora: {r: 4}\n    shard: {gradient_checkpointing: true}\n    prompts:", "stages.policy.shard.gradient_checkpointing", "gradient_checkpointing"),
    Broken("min-above-max", "min_workers: 1", "min_workers: 4", "cluster.min_workers"),
    Broken("out-of-range", "{workers: 2, min_workers: 1}", "{workers: 0}", "cluster.workers"),
    # suites and gates
    Broken("missing-key", "    rewards: {judge: {model: judge}}\n    suites", "    suites", "stages.eval", "  eval:"),
    Broken("missing-key", "num_prompts: 16", "gates: [{metric: policy.win_rate_judge}]", "stages.eval.gates.0"),
    Broken("unknown-metric", "num_prompts: 16", "gates: [{metric: policy.winrate, min: 0.5}]", "stages.eval.gates.0.metric"),
    Broken("min-above-max", "num_prompts: 16", "gates: [{metric: chat.eos_rate, min: 0.9, max: 0.1}]", "stages.eval.gates.0.min"),
    Broken("duplicate-item", "of: [chat, policy]", "of: [chat, chat]", "stages.eval.of.1"),
    Broken("duplicate-item", "{judge: {model: judge}}\n    suites", "{judge: {model: judge}, other: {model: judge}}\n    suites", "stages.eval.rewards.other.model"),
]  # fmt: skip


def _line(text: str, old_text: str, case: Broken) -> int:
    if case.at:
        start = text.index(case.at)
        return text.count("\n", 0, start + len(case.at.rstrip("\n"))) + 1
    pairs = zip(text.splitlines(), old_text.splitlines(), strict=False)
    return next(number for number, (new, old) in enumerate(pairs, start=1) if new != old)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case.code}: {case.new.strip()[:50]}")
def test_it_is_refused_with_its_place(case: Broken, write_recipe: Callable[..., Path], refused: Any) -> None:
    original = write_recipe().read_text()
    path = write_recipe((case.old, case.new))
    with refused(RecipeError, None, path) as refusal:
        load_checked(path)
    problems = refusal.value.problems
    matching = [problem for problem in problems if problem.field == case.field]
    assert matching, f"nothing names {case.field}: {[str(problem) for problem in problems]}"
    assert case.code in {problem.code for problem in matching}
    assert {problem.file for problem in matching} == {str(path)}
    assert matching[0].line == _line(path.read_text(), original, case)


def test_the_chain_itself_is_accepted(write_recipe: Callable[..., Path]) -> None:
    for smoke in (False, True):
        loaded, problems = check_file(write_recipe(), smoke=smoke, check_data=DataCheck())
        assert loaded is not None
        assert problems == []


def test_there_are_enough_rules() -> None:
    assert len({case.code for case in BROKEN}) >= 35


SAID = [
    # what was found and what would be right
    ("tokens: 100_000", "tokens: 9\n      zebra: 8", ("unknown key (found 8)", "valid here: steps, ")),
    ("    kind: reward\n", "", ("required", "one of pretrain, ")),
    ("num_prompts: 16", "num_prompts: '16'", ("whole number (found '16')", "write 16 without quotes")),
    ("lora: {r: 8,", "lora: {dora: yes, r: 8,", ("true or false (found 'yes')", "write true")),
    ("precision: fp32", "precision: fp16", ("auto, fp32 or bf16 (found 'fp16')",)),
    ("init_from: base", "init_from: bass", ("(found 'bass')", "did you mean base?")),
    ("init_from: chat", "init_from: zzz", ("(found 'zzz')", "fitting here: base, chat")),
    ("init_from: base", "init_from: policy", ("chat -> policy -> chat",)),
    ("of: [chat, policy]", "of: [chat, judge]", ("judge (reward) is a reward model", "fitting here: base, chat, policy")),
    ("lora: {r: 8,", "merge: false\n    lora: {r: 8,", ("set stages.chat.merge to true",)),
    # the sum behind a number that does not fit, and numbers that would
    ("{workers: 2,", "{workers: 3,", ("(8)", "3 workers", "remainder 2", "for example 6 or 9")),
    ("micro_batch: auto", "micro_batch: 3", ("(8 / 2 = 4)",)),
    ("mini_batches: 2", "mini_batches: 6", ("remainder 2", "for example 4")),
    ("mini_batches: 2", "mini_batches: 8", ("the batch (1)", "for example 16")),
    ("tokens: 100_000", "tokens: 2_000", ("below the stage's 4 steps", "tokens 2000")),
    ("max_new_tokens: 32}\n    algorithm", "max_new_tokens: 99}\n    algorithm", ("64 + 99 = 163", "max_position_embeddings is 128")),
    ("max_new_tokens: 32}\n    algorithm", "max_new_tokens: 64}\n    algorithm", ("end token", "at most 63")),
    # names of files, columns and tokens that are there
    ("rows/chat.jsonl", "rows/chta.jsonl", ("did you mean rows/chat.jsonl?",)),
    ("files: [rows/pairs.csv]", "columns: {chosen: good}, files: [rows/pairs.csv]", ("no column 'good'", "columns there: prompt, chosen")),
    ("num_prompts: 16", "gates: [{metric: policy.winrate_judge, min: 0.5}]", ("did you mean policy.win_rate_judge?",)),
    # keys of a section written outside of it, a section written as one word, a choice by another word
    ("kl_coef: 0.05", "kl_coef: 0.05\n      critic_lr: 1e-4", ("unknown key (found 0.0001)", "did you mean critic.lr?")),
    ("kl_coef: 0.05", "kl_coef: 0.05\n      critic: reward", ("mapping", "(found 'reward')", "keys: start, lr, warmup")),
    ("kl_coef: 0.05", "kl_coef: 0.05\n      critic: {start: chat}", ("actor or reward (found 'chat')", "its reward model")),
    ("name: ppo", "name: grop", ("did you mean grpo?", "must be ppo, grpo,")),
    ("kl_coef: 0.05", "max_ratio: 4", ("belongs to name: cispo",)),
    ("hidden_size: 64", "hidden_size: 63", ("must divide hidden_size (63)", "for example hidden_size: 60")),
    ("{model: judge}}\n    prompts", "{model: zzz}}\n    prompts", ("no such stage (found 'zzz')", "fitting here: judge [")),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), SAID)
def test_it_says_what_was_found_and_what_would_be_right(
    write_recipe: Callable[..., Path], old: str, new: str, said: tuple[str, ...]
) -> None:
    _, problems = check_file(write_recipe((old, new)), check_data=DataCheck())
    assert any(all(part in str(problem) for part in said) for problem in problems), problems


def test_all_errors_of_a_file_come_at_once(write_recipe: Callable[..., Path]) -> None:
    path = write_recipe(
        ("seed: 3", "seed: 3\nsede: 4"),
        ("tokens: 100_000", "tokens: 9\n      steps: 9\n      stpes: 3"),
        ("lora: {r: 8, target_modules: [q_proj, v_proj]}", "lora: {r: eight}"),
        ("init_from: chat", "init_from: chatt"),
        ("rows/pairs.csv", "rows/none.csv"),
        ("mini_batches: 2", "mini_batches: 3"),
        ("of: [chat, policy]", "of: [chat, judge]"),
    )
    _, problems = check_file(path, check_data=DataCheck())
    fields = {problem.field for problem in problems}
    assert fields == {
        "sede",
        "stages.base.train",
        "stages.base.train.stpes",
        "stages.chat.lora.r",
        "stages.judge.init_from",
        "stages.judge.data.files.0",
        "stages.policy.algorithm.mini_batches",
        "stages.eval.of.1",
    }
    lines = [problem.line for problem in problems if problem.line is not None]
    assert lines == sorted(lines)


def test_a_problem_reads_as_one_line() -> None:
    problem = Problem(Code.WRONG_TYPE, "a.yaml", 3, "stages.base.seed", "'x'", "must be a whole number", "write 1")
    assert str(problem) == "a.yaml:3: stages.base.seed: must be a whole number (found 'x'); write 1 [wrong-type]"
