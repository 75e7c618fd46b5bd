"""Suites `generation` and `comparison`: answers to held-out prompts, and what reward models say of them.

Shapes: B samples, P prompt tokens, R response tokens, T tokens of both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recipes.stages.evaluate import Evaluate
from rlhf.algorithms.kl import k1, k3
from rlhf.text.answer_metrics import Answer, ModelAnswers, comparison_metrics, generation_metrics, side_by_side
from rlhf.text.policy import response_logprobs
from rlhf.text.responses import Responses, responses_of
from rlhf.text.reward_inputs import Reading
from rlhf.text.reward_model import ScoreModel
from rlhf.text.stage import reading_by
from trainers.data.batches import PromptBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.order import global_sample
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.suite import Measured, Parts, open_measured
from trainers.inference.generation import sampling_settings
from trainers.inference.rollouts import generate_in_parts, response_uniforms
from trainers.models.load import head_name
from trainers.runtime import distributed
from trainers.training.context import StageContext, model_folder, open_dataset, text_request

FORWARD_BATCH = 16
"""Rows of a forward pass."""
GENERATION_BATCH = 128


def measure_answers(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Let every model answer the prompts; with suite `comparison` reward models compare the answers. Collective."""
    answers, samples = _answers(spec, context, labels, parts)
    metrics = {"prompts": float(len(answers[0].answers))}
    for model in answers:
        metrics |= generation_metrics(model)
    if "comparison" in spec.suites:
        metrics |= comparison_metrics(answers)
    return Measured(metrics, samples)


def _answers(
    spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts
) -> tuple[list[ModelAnswers], list[dict[str, Any]]]:
    """Let every model answer, score the answers, and put all ranks' parts together; collective."""
    tokenization = load_tokenization(model_folder(context, "of.0"))  # that of all: `check_tokenizers`
    first = open_measured(spec, context, "of.0", "language_model")
    scorers = [(path, _scorer(spec, context, path)) for path in ("reward", "second_scorer") if path in context.inputs]
    found: list[ModelAnswers] = []
    texts: dict[str, list[str]] = {}
    for index, label in enumerate(labels):
        place = parts.place(index)
        prompts = open_dataset(
            context,
            text_request(
                context, spec.get_source("prompts"), tokenization, spec.sampling.max_prompt_tokens, spec.template
            ),
        )
        model = first if index == 0 else open_measured(spec, context, f"of.{index}", "language_model")
        responses = _respond(spec, context, model, prompts, tokenization, place)
        judges = [(scorer, reading_by(context, path, prompts, tokenization)) for path, scorer in scorers]
        own = _judged(spec, context, responses, model, first, judges, tokenization.vocab_size, place)
        places = {row: place for place, row in enumerate(_drawn_rows(spec, context, prompts))}
        merged = [Answer(*line) for part in distributed.gather_json(own) for line in part]
        merged.sort(key=lambda line: places[line.row])
        found.append(ModelAnswers(label, merged))
        shown = merged[: spec.num_samples]
        texts[label] = [tokenization.decode(line.tokens, skip_special=True) for line in shown]
        if index == 0:
            records = {line.row: prompts.records[line.row] for line in shown}
    return found, side_by_side(found, records, texts, spec.num_samples)


@torch.no_grad()
def _respond(
    spec: Evaluate,
    context: StageContext,
    model: nn.Module,
    prompts: Dataset,
    tokenization: Tokenization,
    place: Mapping[str, float],
) -> Responses | None:
    """This rank's answers; every model draws with the same uniforms for the same prompt."""
    drawn = _drawn_rows(spec, context, prompts)
    rows = drawn[context.ranks.rank :: context.ranks.world_size]
    if not rows:
        return None

    def watch(share: float) -> None:
        context.observer.phase("answer", rows=int(share * len(drawn)), rows_planned=len(drawn), **place)

    batch = build_batch(prompts, rows)
    assert isinstance(batch, PromptBatch)
    asked = spec.sampling
    settings = sampling_settings(tokenization, asked.max_new_tokens, asked.temperature, asked.stop_tokens)
    keys = [(row, 0) for row in rows]
    uniforms_BR = response_uniforms(context.seed, "evaluate", 0, keys, settings.max_new_tokens)
    prompts_here = batch.to(context.ranks.device)
    written = generate_in_parts(model, prompts_here, settings, uniforms_BR, GENERATION_BATCH, watch)
    return responses_of(prompts_here, written.tokens_BR, written.response_mask_BR, written.ended_B)


@torch.no_grad()
def _judged(
    spec: Evaluate,
    context: StageContext,
    responses: Responses | None,
    model: nn.Module,
    first: nn.Module,
    judges: Sequence[tuple[ScoreModel, Reading]],
    num_tokens: int,
    place: Mapping[str, float],
) -> list[list[Any]]:
    """Lines of `Answer` fields: what was written, its KL against the first model, its scores."""
    if responses is None:
        return []
    lines: list[list[Any]] = []
    count, workers = len(responses.sample_ids_B), context.ranks.world_size
    for start in range(0, count, FORWARD_BATCH):
        context.observer.phase("judge", rows=start * workers, rows_planned=count * workers, **place)
        part = responses.rows(range(start, min(start + FORWARD_BATCH, len(responses.sample_ids_B))))
        kl = kl_k3 = [0.0] * len(part.sample_ids_B)
        if first is not model:
            own_BR = response_logprobs(model, part, spec.sampling.temperature, num_tokens)
            first_BR = response_logprobs(first, part, spec.sampling.temperature, num_tokens)
            kl = k1(own_BR, first_BR).double().sum(dim=1).tolist()
            kl_k3 = k3(own_BR, first_BR).double().sum(dim=1).tolist()
        scores = [scorer(read(part)).tolist() for scorer, read in judges]
        for at, tokens in enumerate(part.response_ids):
            own_scores = [column[at] for column in scores]
            row, ended = int(part.sample_ids_B[at]), bool(part.ended_B[at])
            lines.append([row, tokens, ended, kl[at], kl_k3[at], *own_scores])
    return lines


def _drawn_rows(spec: Evaluate, context: StageContext, prompts: Dataset) -> list[int]:
    """The prompts to answer, drawn by the seed."""
    count = min(spec.num_prompts, len(prompts))
    return [global_sample(prompts.digest, context.seed, place, len(prompts)) for place in range(count)]


def _scorer(spec: Evaluate, context: StageContext, field_path: str) -> ScoreModel:
    network = open_measured(spec, context, field_path, "score_model")
    return ScoreModel(network, head_name(network)).eval()
