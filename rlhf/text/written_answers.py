"""Benchmarks whose answers are written, and scored by the terms that rewards are made of."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from recipes.stages.benchmarks.generate import Generate
from recipes.stages.benchmarks.union import AnyBenchmark
from recipes.stages.evaluate import Evaluate
from rlhf.rewards.terms import open_text_terms
from trainers.data.batches import pad_texts
from trainers.data.tokenizer import Tokenization
from trainers.evaluation.cases import Answered, Asked
from trainers.evaluation.suite import open_measured
from trainers.inference.generation import generate, sampling_settings
from trainers.inference.rollouts import response_uniforms
from trainers.training.context import StageContext

ROWS_AT_ONCE = 16


def write(
    spec: Evaluate,
    context: StageContext,
    benchmark: AnyBenchmark,
    path: str,
    tokenization: Tokenization,
    asked: Sequence[Asked],
) -> Iterator[list[Answered]]:
    """Yield answers with their scores, some cases at a time, those with the longest prompts first."""
    assert isinstance(benchmark, Generate)
    terms = open_text_terms(benchmark.scorers, context.base_dir, [one.record for one in asked])
    model = open_measured(spec, context, path, "language_model")
    settings = sampling_settings(tokenization, benchmark.max_new_tokens, benchmark.temperature)
    prompts = [prompt_tokens(benchmark, one.case.best[0], tokenization) for one in asked]
    order = sorted(range(len(asked)), key=lambda place: -len(prompts[place]))
    device = context.ranks.device
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        batch = pad_texts([np.asarray(prompts[row]) for row in rows], settings.pad_id, left=True)
        uniforms = None
        if benchmark.temperature > 0:
            keys = [(asked[row].number, 0) for row in rows]
            uniforms = response_uniforms(context.seed, "benchmark", 0, keys, settings.max_new_tokens)
        with torch.no_grad():
            found = generate(
                model, batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device), settings, uniforms
            )
        written = zip(found.tokens_BR, found.response_mask_BR, strict=True)
        texts = [benchmark.cut(tokenization.decode(tokens[mask].tolist())) for tokens, mask in written]
        records = [asked[row].record for row in rows]
        scores = {term.name: term.values(texts, records) for term in terms}
        yield [
            Answered(one.number, one.id, {name: values[place] for name, values in scores.items()}, texts[place])
            for place, one in enumerate(asked[row] for row in rows)
        ]


def prompt_tokens(benchmark: Generate, prompt: str, tokenization: Tokenization) -> list[int]:
    """Return the tokens of a prompt, as the user's turn where the benchmark says so."""
    if benchmark.template == "chat":
        return tokenization.encode_prompt([{"role": "user", "content": prompt}])
    return tokenization.encode_prompt(prompt)
