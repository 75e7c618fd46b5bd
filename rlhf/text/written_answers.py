"""Benchmarks whose answers are written, and scored by the terms that rewards are made of."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from recipes.stages.benchmarks.union import AnyBenchmark
from recipes.stages.benchmarks.written import Written
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
    assert isinstance(benchmark, Written)
    terms = open_text_terms(benchmark.terms, context.base_dir, [one.record for one in asked])
    model = open_measured(spec, context, path, "language_model")
    settings = sampling_settings(tokenization, benchmark.max_new_tokens, benchmark.temperature)
    prompts = {one.number: prompt_tokens(benchmark, one.case.best[0], tokenization) for one in asked}
    order = sorted(asked, key=lambda one: -len(prompts[one.number]))
    device = context.ranks.device

    def drawn(keys: Sequence[tuple[int, int]]) -> list[str]:
        """Answers by the numbers of cases and draws."""
        batch = pad_texts([np.asarray(prompts[number]) for number, _ in keys], settings.pad_id, left=True)
        uniforms = None
        if benchmark.temperature > 0:
            uniforms = response_uniforms(context.seed, "benchmark", 0, keys, settings.max_new_tokens)
        with torch.no_grad():
            found = generate(
                model, batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device), settings, uniforms
            )
        written = zip(found.tokens_BR, found.response_mask_BR, strict=True)
        return [benchmark.cut(tokenization.decode(tokens[mask].tolist())) for tokens, mask in written]

    at_once = max(1, ROWS_AT_ONCE // benchmark.draws)
    for start in range(0, len(order), at_once):
        part = order[start : start + at_once]
        keys = [(one.number, draw) for one in part for draw in range(benchmark.draws)]
        texts = [
            text for first in range(0, len(keys), ROWS_AT_ONCE) for text in drawn(keys[first : first + ROWS_AT_ONCE])
        ]
        records = [one.record for one in part for _ in range(benchmark.draws)]
        scores = {term.name: term.values(texts, records) for term in terms}
        yield [
            _answered(benchmark, one, texts, scores, slice(first, first + benchmark.draws))
            for first, one in zip(range(0, len(keys), benchmark.draws), part, strict=True)
        ]


def _answered(
    benchmark: Written, one: Asked, texts: Sequence[str], scores: Mapping[str, Sequence[float]], own: slice
) -> Answered:
    """What was written for a case, at these places, and its figures."""
    by_term = {name: values[own] for name, values in scores.items()}
    details = {} if benchmark.draws == 1 else {"said": list(texts[own]), "scores": by_term}
    return Answered(one.number, one.id, benchmark.judged_draws(by_term), texts[own.start], details)


def prompt_tokens(benchmark: Written, prompt: str, tokenization: Tokenization) -> list[int]:
    """Return the tokens of a prompt, as the user's turn where the benchmark says so."""
    if benchmark.template == "chat":
        return tokenization.encode_prompt([{"role": "user", "content": prompt}])
    return tokenization.encode_prompt(prompt)
