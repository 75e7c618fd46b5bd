# ruff: noqa: E501 - one line a case
"""Classes of broken recipe: each is refused with the file, the line, the field and what would be right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recipes.errors import Problem, RecipeError
from recipes.loading.load import check_file, load_recipe


class Broken(NamedTuple):
    """One broken recipe: an edit of the chain's text and the finding it must give."""

    kind: str
    old: str
    new: str
    field: str
    says: str
    """Part of the message or the suggestion."""
    at: str = ""
    """Text of the line that must be named; the edited line by default."""


BROKEN = [
    # unknown key
    Broken("unknown key", "      tokens: 100_000", "      tokens: 9\n      stpes: 3", "stages.base.train.stpes", "did you mean steps?", "stpes"),
    Broken("unknown key", "seed: 3", "seed: 3\nsede: 4", "sede", "did you mean seed?", "sede"),
    Broken("unknown key", "    shard: {zero: 2,", "    lr: 1\n    shard: {zero: 2,", "stages.base.lr", "did you mean train.optimizer.lr?", "lr: 1\n"),
    Broken("unknown key", "lora: {r: 8,", "lora: {rank: 8,", "stages.chat.lora.rank", "unknown key"),
    Broken("unknown key", "hidden_size: 64", "hidden_size: 64\n      vocab_size: 9", "stages.base.architecture.vocab_size", "tokenizer.vocab_size", "vocab_size: 9"),
    Broken("unknown key", "{workers: 2,", "{workrs: 2,", "cluster.workrs", "did you mean workers?"),
    # missing key
    Broken("missing key", "      global_batch: 8\n      sequence_length: 64\n      optimizer: {lr: 1e-3}\n      schedule", "      sequence_length: 64\n      optimizer: {lr: 1e-3}\n      schedule", "stages.base.train.global_batch", "required", "    train:\n"),
    Broken("missing key", "    actor: chat\n", "", "stages.policy.actor", "required", "  policy:"),
    Broken("missing key", "optimizer: {lr: 1e-4}", "optimizer: {}", "stages.policy.ppo.optimizer.lr", "required"),
    Broken("missing key", "    kind: reward\n", "", "stages.judge.kind", "one of pretrain", "  judge:"),
    Broken("missing key", "name: chain\n", "", "name", "required", "seed: 3"),
    # wrong type
    Broken("wrong type", "num_prompts: 16", "num_prompts: many", "stages.exam.num_prompts", "whole number"),
    Broken("wrong type", "num_prompts: 16", "num_prompts: '16'", "stages.exam.num_prompts", "write 16 without quotes"),
    Broken("wrong type", "of: [chat, policy]", "of: chat", "stages.exam.of", "must be a list"),
    Broken("wrong type", "lora: {r: 8,", "lora: {dora: yes, r: 8,", "stages.chat.lora.dora", "write true"),
    Broken("wrong type", "optimizer: {lr: 1e-4}", "optimizer: 1e-4", "stages.policy.ppo.optimizer", "mapping of keys"),
    Broken("wrong type", "zero: 2", "zero: true", "stages.base.shard.zero", "whole number"),
    Broken("wrong type", "iterations: 4", "iterations: 12:30", "stages.policy.ppo.iterations", "whole number"),
    # out of range
    Broken("out of range", "optimizer: {lr: 1e-4}", "optimizer: {lr: 0}", "stages.policy.ppo.optimizer.lr", "greater than 0"),
    Broken("out of range", "kl_coef: 0.05", "kl_coef: -0.1", "stages.policy.ppo.kl_coef", "greater than or equal to 0"),
    Broken("out of range", "num_hidden_layers: 2", "num_hidden_layers: 10_000", "stages.base.architecture.num_hidden_layers", "less than or equal to 512"),
    Broken("out of range", "hold_out: 0.1}", "hold_out: 1.5}", "stages.chat.data.hold_out", "less than 1"),
    Broken("out of range", "optimizer: {lr: 1e-4}", "optimizer: {lr: 1, betas: [0.9, 1.0]}", "stages.policy.ppo.optimizer.betas.1", "less than 1"),
    # unknown choice
    Broken("unknown choice", "kind: reward", "kind: rewrad", "stages.judge.kind", "did you mean reward?"),
    Broken("unknown choice", "type: llama", "type: lama", "stages.base.architecture.type", "did you mean llama?"),
    Broken("unknown choice", "precision: fp32", "precision: fp16", "stages.base.shard.precision", "fp32 or bf16"),
    Broken("unknown choice", "{source: csv,", "{source: cvs,", "stages.judge.data.source", "did you mean csv?"),
    Broken("unknown choice", "zero: 2", "zero: 4", "stages.base.shard.zero", "0, 1, 2 or 3"),
    Broken("unknown choice", "suites: [perplexity,", "suites: [perplexty,", "stages.exam.suites.0", "did you mean perplexity?"),
    # not YAML that a recipe may use
    Broken("yaml", "seed: 3", "seed: 3\nseed: 4", "seed", "first in line 2", "seed: 4"),
    Broken("yaml", "seed: 3", "seed: &a 3", "seed", "anchors are not allowed"),
    Broken("yaml", "seed: 3", "seed: !!python/object/apply:os.system [x]", "seed", "tags are not allowed"),
    Broken("yaml", "seed: 3", "seed: 0123", "seed", "must not start with 0"),
    Broken("yaml", "seed: 3", "seed: [3", "", "not valid YAML", "cluster:"),
    Broken("yaml", "seed: 3", "\tseed: 3", "", "not valid YAML"),
    Broken("yaml", "kl_coef: 0.05", "kl_coef: .nan", "stages.policy.ppo.kl_coef", "infinities and NaN"),
    # stage that is not there
    Broken("missing stage", "init_from: base", "init_from: bass", "stages.chat.init_from", "did you mean base?"),
    Broken("missing stage", "reward: judge\n    prompts", "reward: juge\n    prompts", "stages.policy.reward", "did you mean judge?"),
    Broken("missing stage", "of: [chat, policy]", "of: [chat, polcy]", "stages.exam.of.1", "did you mean policy?"),
    Broken("missing stage", "init_from: chat", "init_from: zzz", "stages.judge.init_from", "stages here: base, chat"),
    # circle
    Broken("circle", "init_from: base", "init_from: policy", "stages.policy.actor", "chat -> policy -> chat", "actor: chat"),
    Broken("circle", "init_from: base", "init_from: chat", "stages.chat.init_from", "its own output"),
    Broken("circle", "actor: chat", "actor: policy", "stages.policy.actor", "its own output"),
    # wrong kind of artifact, or part
    Broken("wrong kind", "reward: judge\n    prompts", "reward: chat\n    prompts", "stages.policy.reward", "needs a reward model, but chat (finetune) is a language model"),
    Broken("wrong kind", "of: [chat, policy]", "of: [chat, judge]", "stages.exam.of.1", "fitting here: base, chat, policy"),
    Broken("wrong kind", "init_from: chat", "init_from: exam", "stages.judge.init_from", "is a report"),
    Broken("wrong kind", "of: [chat, policy]", "of: [chat, policy.critic]", "stages.exam.of.1", "is a critic"),
    Broken("wrong kind", "of: [chat, policy]", "of: [chat, policy.actr]", "stages.exam.of.1", "did you mean policy.actor?"),
    Broken("wrong kind", "lora: {r: 8,", "merge: false\n    lora: {r: 8,", "stages.judge.init_from", "set stages.chat.merge to true", "init_from: chat"),
    # reference that cannot be read
    Broken("reference", "init_from: base", "init_from: hf://org/name", "stages.chat.init_from", "needs its revision"),
    Broken("reference", "init_from: base", "init_from: https://example.org/model", "stages.chat.init_from", "unknown scheme"),
    Broken("reference", "init_from: base", "init_from: ~/model", "stages.chat.init_from", "'~' is not expanded"),
    Broken("reference", "init_from: base", "init_from: store://x y", "stages.chat.init_from", "store://NAME"),
    Broken("reference", "init_from: base", "init_from: $(touch x)", "stages.chat.init_from", "not a stage name"),
    # batches that do not divide
    Broken("batch", "      global_batch: 8", "      global_batch: 9", "stages.base.train.global_batch", "among 2 workers"),
    Broken("batch", "{workers: 2,", "{workers: 3,", "stages.base.train.global_batch", "remainder 2", "      global_batch: 8"),
    Broken("batch", "micro_batch: auto", "micro_batch: 3", "stages.base.shard.micro_batch", "(8 / 2 = 4)"),
    Broken("batch", "mini_batches: 2", "mini_batches: 3", "stages.policy.ppo.mini_batches", "remainder 2"),
    Broken("batch", "{prompts_per_iteration: 8,", "{prompts_per_iteration: 7, samples_per_prompt: 2,", "stages.policy.rollout.prompts_per_iteration", "among 2 workers"),
    Broken("batch", "mini_batches: 2", "mini_batches: 8", "stages.policy.rollout.prompts_per_iteration", "the batch (1)", "prompts_per_iteration"),
    Broken("batch", "mini_batches: 2", "mini_batches: 8", "stages.policy.rollout.prompts_per_iteration", "for example 16", "prompts_per_iteration"),
    Broken("batch", "{prompts_per_iteration: 8,", "{prompts_per_iteration: 7, samples_per_prompt: 4,", "stages.policy.rollout.prompts_per_iteration", "for example 6 or 8"),
    Broken("batch", "mini_batches: 2", "mini_batches: 6", "stages.policy.ppo.mini_batches", "for example 4"),
    # longer than the model
    Broken("length", "      sequence_length: 64", "      sequence_length: 256", "stages.base.train.sequence_length", "max_position_embeddings is 128"),
    Broken("length", "max_new_tokens: 32}\n    ppo", "max_new_tokens: 99}\n    ppo", "stages.policy.rollout.max_new_tokens", "64 + 99 = 163"),
    Broken("length", "max_new_tokens: 32}\n    ppo", "max_new_tokens: 64}\n    ppo", "stages.policy.rollout.max_new_tokens", "and the end token that a reward model reads after an unfinished response are longer than the model"),
    Broken("length", "    sequence_length: 64\n    sampling", "    sequence_length: 129\n    sampling", "stages.exam.sequence_length", "at most 128"),
    Broken("length", "max_position_embeddings: 128", "max_position_embeddings: 32", "stages.chat.train.sequence_length", "at most 32", "steps: 20\n      global_batch: 8\n      sequence_length: 64"),
    # steps
    Broken("steps", "tokens: 100_000", "tokens: 100_000\n      steps: 5", "stages.base.train", "exactly one of steps, tokens and epochs", "    train:\n"),
    Broken("steps", "warmup_steps: 5", "warmup_steps: 500", "stages.base.train.schedule.warmup_steps", "below the stage's 196 steps"),
    Broken("steps", "kl_coef: 0.05", "critic_warmup: 4", "stages.policy.ppo.critic_warmup", "the actor never learns"),
    Broken("steps", "kl_coef: 0.05", "schedule: {warmup_steps: 16}", "stages.policy.ppo.schedule.warmup_steps", "below the stage's 16 steps"),
    Broken("steps", "kl_coef: 0.05", "save_every: 5 steps", "stages.policy.ppo.save_every", "expected a whole number of iterations, for example 50 or '50 iterations'"),
    Broken("steps", "global_batch: 8\n      sequence_length: 64", "global_batch: 8\n      save_every: 5 iterations\n      sequence_length: 64", "stages.base.train.save_every", "expected a whole number of steps, for example 50 or '50 steps'"),
    Broken("steps", "      tokens: 100_000\n", "", "stages.base.train", "found none of them", "    train:\n"),
    # architecture that does not fit together
    Broken("architecture", "num_attention_heads: 4", "num_attention_heads: 6", "stages.base.architecture", "num_attention_heads (6) must divide hidden_size (64)", "architecture:"),
    Broken("architecture", "num_key_value_heads: 2", "num_key_value_heads: 3", "stages.base.architecture", "must divide num_attention_heads (4)", "architecture:"),
    Broken("architecture", "type: llama", "type: llama\n      rope_parameters: {rope_type: linear}", "stages.base.architecture.rope_parameters", "needs factor", "rope_parameters"),
    Broken("architecture", "target_modules: [q_proj, v_proj]", "target_modules: [q_proj, c_attn]", "stages.chat.lora.target_modules.1", "linear modules: q_proj"),
    # tokens that the tokenizer does not know
    Broken("token", "max_new_tokens: 32}\n    ppo", "max_new_tokens: 32, stop_tokens: ['<|stop|>']}\n    ppo", "stages.policy.rollout.stop_tokens.0", "not one token"),
    Broken("token", "vocab_size: 512", "vocab_size: 512\n      pad_token: <|end|>", "stages.base.tokenizer", "more than once", "tokenizer:"),
    Broken("token", "vocab_size: 512", "vocab_size: 512\n      special_tokens: ['<|user|>', '<|system|>']", "stages.base.tokenizer.special_tokens", "add <|assistant|>", "special_tokens"),
    Broken("token", "vocab_size: 512", "vocab_size: 300\n      special_tokens: [" + ", ".join(f"t{n}" for n in range(60)) + "]", "stages.base.tokenizer.vocab_size", "at least 318", "vocab_size"),
    Broken("token", "vocab_size: 512", "vocab_size: 512\n      chat_template: '{% for m in messages %}'", "stages.base.tokenizer.chat_template", "Jinja template", "chat_template"),
    # data files
    Broken("data file", "rows/chat.jsonl", "rows/chta.jsonl", "stages.chat.data.files.0", "did you mean rows/chat.jsonl?"),
    Broken("data file", "rows/chat.jsonl", "rows/*.json", "stages.chat.data.files.0", "no file matches"),
    Broken("data file", "rows/chat.jsonl", "rows/pairs.csv", "stages.chat.data.files.0", "pairs.csv:1: not JSON"),
    Broken("data file", "rows/chat.jsonl", "rows", "stages.chat.data.files.0", "is a folder"),
    Broken("data file", "{source: jsonl, files: [rows/chat.jsonl]", "{source: parquet, files: [rows/chat.jsonl]", "stages.chat.data.files.0", "not a Parquet file"),
    Broken("data file", "files: [rows/pairs.csv]", "columns: {chosen: good}, files: [rows/pairs.csv]", "stages.judge.data.files.0", "no column 'good'"),
    Broken("data file", "{source: csv, files: [rows/pairs.csv]", "{source: text, files: [rows/text.txt]", "stages.judge.data.source", "needs chosen+rejected"),
    Broken("data file", "{source: jsonl, files: [rows/chat.jsonl], hold_out: 0.1}", "{source: datasets, path: org/name, hold_out: 0.1}", "stages.chat.data.path", "needs its `revision`"),
    Broken("data file", "files: [rows/pairs.csv], hold_out: 0.1", "files: [rows/pairs.csv]", "stages.judge.data", "no held-out pairs"),
    Broken("data file", "part: 1/2", "part: 3/2", "stages.policy.prompts", "between 1 and 2"),
    # placement that excludes itself
    Broken("placement", "zero: 2", "engine: plain, zero: 2", "stages.base.shard", "without engine: deepspeed", "shard:"),
    Broken("placement", "zero: 2", "zero: 0, offload: cpu", "stages.base.shard.offload", "zero 1, 2 or 3"),
    Broken("placement", "    reward: judge\n    prompts:", "    reward: judge\n    lora: {r: 4}\n    shard: {gradient_checkpointing: true}\n    prompts:", "stages.policy.shard.gradient_checkpointing", "several adapters", "gradient_checkpointing"),
    Broken("placement", "min_workers: 1", "min_workers: 4", "cluster.min_workers", "at most workers (2)"),
    Broken("placement", "{workers: 2, min_workers: 1}", "{workers: 0}", "cluster.workers", "greater than or equal to 1"),
    # suites and gates
    Broken("evaluation", "    reward: judge\n    suites", "    suites", "stages.exam", "needs `reward`", "  exam:"),
    Broken("evaluation", "num_prompts: 16", "gates: [{metric: policy.win_rate}]", "stages.exam.gates.0", "give min, max or both"),
    Broken("evaluation", "num_prompts: 16", "gates: [{metric: policy.winrate, min: 0.5}]", "stages.exam.gates.0.metric", "did you mean policy.win_rate?"),
    Broken("evaluation", "num_prompts: 16", "gates: [{metric: chat.eos_rate, min: 0.9, max: 0.1}]", "stages.exam.gates.0.min", "at most max"),
    Broken("evaluation", "of: [chat, policy]", "of: [chat, chat]", "stages.exam.of.1", "twice"),
    Broken("evaluation", "num_prompts: 16", "second_scorer: judge", "stages.exam.second_scorer", "another reward model"),
]  # fmt: skip


def _line(text: str, old_text: str, case: Broken) -> int:
    if case.at:
        start = text.index(case.at)
        return text.count("\n", 0, start + len(case.at.rstrip("\n"))) + 1
    pairs = zip(text.splitlines(), old_text.splitlines(), strict=False)
    return next(number for number, (new, old) in enumerate(pairs, start=1) if new != old)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case.kind}: {case.new.strip()[:50]}")
def test_it_is_refused_with_its_place(case: Broken, write_recipe: Callable[..., Path], refused: Any) -> None:
    original = write_recipe().read_text()
    path = write_recipe((case.old, case.new))
    with refused(RecipeError, None, path) as refusal:
        load_recipe(path)
    problems = refusal.value.problems
    matching = [problem for problem in problems if problem.field == case.field]
    assert matching, f"nothing names {case.field}: {[str(problem) for problem in problems]}"
    assert case.says in " | ".join(f"{problem.message}; {problem.suggestion}" for problem in matching)
    assert {problem.file for problem in matching} == {str(path)}
    assert matching[0].line == _line(path.read_text(), original, case)


def test_the_chain_itself_is_accepted(write_recipe: Callable[..., Path]) -> None:
    for smoke in (False, True):
        loaded, problems = check_file(write_recipe(), smoke=smoke)
        assert loaded is not None
        assert problems == []


def test_there_are_enough_classes() -> None:
    kinds = [case.kind for case in BROKEN]
    assert len(set(kinds)) >= 12
    assert all(kinds.count(kind) >= 3 for kind in kinds)


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
    _, problems = check_file(path)
    fields = {problem.field for problem in problems}
    assert fields == {
        "sede",
        "stages.base.train",
        "stages.base.train.stpes",
        "stages.chat.lora.r",
        "stages.judge.init_from",
        "stages.judge.data.files.0",
        "stages.policy.ppo.mini_batches",
        "stages.exam.of.1",
    }
    lines = [problem.line for problem in problems if problem.line is not None]
    assert lines == sorted(lines)


def test_a_problem_reads_as_one_line() -> None:
    problem = Problem("a.yaml", 3, "stages.base.seed", "'x'", "must be a whole number", "write 1")
    assert str(problem) == "a.yaml:3: stages.base.seed: must be a whole number (found 'x'); write 1"
