"""Suites `generation` and `comparison`: answers to held-out prompts, and what reward models say of them.

Shapes: B samples, P prompt tokens, R response tokens, T tokens of both.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from recipes.errors import RequestError
from recipes.stages.evaluate import Evaluate
from rlhf.algorithms.kl import k1, k3
from rlhf.rewards.terms import open_text_terms
from rlhf.text.answer_metrics import Answer, ModelAnswers, comparison_metrics, generation_metrics, side_by_side
from rlhf.text.policy import response_logprobs
from rlhf.text.responses import Responses, responses_of
from rlhf.text.reward_inputs import Reading
from rlhf.text.reward_model import ScoreModel
from rlhf.text.rewards import TextReward
from rlhf.text.stage import reading_by
from trainers.data.batches import PromptBatch, build_batch
from trainers.data.conversation import as_conversation
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
    tokenizations = [load_tokenization(model_folder(context, f"of.{index}")) for index in range(len(labels))]
    sets = _open_prompts(spec, context, tokenizations)
    drawn = shared_prompts(sets, spec.num_prompts, context.seed)
    first = open_measured(spec, context, "of.0", "language_model")
    scorers = [(path, _scorer(spec, context, path)) for path in ("reward", "second_scorer") if path in context.inputs]
    found: list[ModelAnswers] = []
    texts: dict[str, list[str]] = {}
    for index, (label, tokenization, prompts) in enumerate(zip(labels, tokenizations, sets, strict=True)):
        place, rows = parts.place(index), drawn[index]
        model = first if index == 0 else open_measured(spec, context, f"of.{index}", "language_model")
        responses = _respond(spec, context, model, prompts, rows, drawn[0], tokenization, place)
        comparable = first if tokenization.contract_hash == tokenizations[0].contract_hash else None
        judges = [(scorer, reading_by(context, path, prompts, tokenization)) for path, scorer in scorers]
        terms = TextReward(
            dict.fromkeys(spec.rewards, 1.0),
            terms=open_text_terms(spec.rewards, context.base_dir, prompts.records),
            records=prompts.records,
            decode=partial(tokenization.decode, skip_special=True),
        )
        own = _judged(spec, context, responses, model, comparable, judges, terms, tokenization.vocab_size, place)
        places = {row: place for place, row in enumerate(rows)}
        merged = [Answer(**line) for part in distributed.gather_json(own) for line in part]
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
    drawn: Sequence[int],
    keys: Sequence[int],
    tokenization: Tokenization,
    place: Mapping[str, float],
) -> Responses | None:
    """This rank's answers; every model draws with the same uniforms for the same prompt, known by its key."""
    own = slice(context.ranks.rank, None, context.ranks.world_size)
    rows = drawn[own]
    if not rows:
        return None

    def watch(share: float) -> None:
        context.observer.phase("answer", rows=int(share * len(drawn)), rows_planned=len(drawn), **place)

    batch = build_batch(prompts, rows)
    assert isinstance(batch, PromptBatch)
    asked = spec.sampling
    settings = sampling_settings(tokenization, asked.max_new_tokens, asked.temperature, asked.stop_tokens)
    uniforms_BR = response_uniforms(
        context.seed, "evaluate", 0, [(key, 0) for key in keys[own]], settings.max_new_tokens
    )
    prompts_here = batch.to(context.ranks.device)
    written = generate_in_parts(model, prompts_here, settings, uniforms_BR, GENERATION_BATCH, watch)
    return responses_of(prompts_here, written.tokens_BR, written.response_mask_BR, written.ended_B)


@torch.no_grad()
def _judged(
    spec: Evaluate,
    context: StageContext,
    responses: Responses | None,
    model: nn.Module,
    first: nn.Module | None,
    judges: Sequence[tuple[ScoreModel, Reading]],
    terms: TextReward,
    num_tokens: int,
    place: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Lines of `Answer` fields: what was written, its KL against the first model, its rewards by term, its scores.

    Without a `first` model there is no KL: it reads other tokens, or was asked by another template.
    """
    if responses is None:
        return []
    lines: list[dict[str, Any]] = []
    count, workers = len(responses.sample_ids_B), context.ranks.world_size
    for start in range(0, count, FORWARD_BATCH):
        context.observer.phase("judge", rows=start * workers, rows_planned=count * workers, **place)
        part = responses.rows(range(start, min(start + FORWARD_BATCH, len(responses.sample_ids_B))))
        kl: list[float | None] = [0.0 if first is model else None] * len(part.sample_ids_B)
        kl_k3 = kl
        if first is not None and first is not model:
            own_BR = response_logprobs(model, part, spec.sampling.temperature, num_tokens)
            first_BR = response_logprobs(first, part, spec.sampling.temperature, num_tokens)
            kl = k1(own_BR, first_BR).double().sum(dim=1).tolist()
            kl_k3 = k3(own_BR, first_BR).double().sum(dim=1).tolist()
        scores = [scorer(read(part)).tolist() for scorer, read in judges]
        values = {name: values_B.tolist() for name, values_B in terms.by_term(terms.text_values(part), None).items()}
        for at, tokens in enumerate(part.response_ids):
            own_scores = [column[at] for column in scores]
            row, ended = int(part.sample_ids_B[at]), bool(part.ended_B[at])
            line = Answer(row, tokens, ended, kl[at], kl_k3[at], *own_scores)
            lines.append({**vars(line), "rewards": {name: column[at] for name, column in values.items()}})
    return lines


def _open_prompts(spec: Evaluate, context: StageContext, tokenizations: Sequence[Tokenization]) -> list[Dataset]:
    """The prompts as each tokenizer reads them; collective."""
    use, length = spec.get_source("prompts"), spec.sampling.max_prompt_tokens
    opened: dict[str, Dataset] = {}
    for tokenization in tokenizations:
        if tokenization.contract_hash not in opened:
            request = text_request(context, use, tokenization, length, spec.template)
            opened[tokenization.contract_hash] = open_dataset(context, request)
    return [opened[tokenization.contract_hash] for tokenization in tokenizations]


def shared_prompts(sets: Sequence[Dataset], most: int, seed: int) -> list[list[int]]:
    """Rows in each set of at most so many prompts, the same prompts in all sets, drawn by the seed.

    A prompt that a set lacks, being too long for its tokenizer, is drawn from none. Raises RequestError for no prompts.
    """
    first = sets[0]
    others = [
        None if other.digest == first.digest else {_known_by(record): row for row, record in enumerate(other.records)}
        for other in sets
    ]
    drawn: list[list[int]] = [[] for _ in sets]
    for position in range(len(first)):
        row = global_sample(first.digest, seed, position, len(first))
        found = [row if rows is None else rows.get(_known_by(first.records[row])) for rows in others]
        places = [own for own in found if own is not None]
        if len(places) == len(sets):
            for chosen, own in zip(drawn, places, strict=True):
                chosen.append(own)
        if len(drawn[0]) == most:
            break
    if not drawn[0]:
        raise RequestError("prompts: none is short enough for the tokenizers of all models in `of`")
    return drawn


def _known_by(record: Mapping[str, Any]) -> tuple[str, str]:
    """Where a prompt came from and what it asks, whether it was put to a model as text or as turns."""
    return record["id"], json.dumps(as_conversation({"prompt": record["prompt"]})["prompt"], sort_keys=True)


def _scorer(spec: Evaluate, context: StageContext, field_path: str) -> ScoreModel:
    network = open_measured(spec, context, field_path, "score_model")
    return ScoreModel(network, head_name(network)).eval()
