"""Suites `generation` and `comparison`: answers to held-out prompts, and what a reward says of them.

Shapes: B samples, P prompt tokens, R response tokens, T tokens of both.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recipes.errors import RequestError
from recipes.stages.evaluate import Evaluate
from recipes.stages.rollout import Sampling
from recipes.stages.suites import NOISE, TRUTH, noise_findings
from rlhf.algorithms.kl import k1, k3
from rlhf.rewards.judge import Judge
from rlhf.text.answer_metrics import Answer, ModelAnswers, comparison_metrics, generation_metrics, side_by_side
from rlhf.text.counted_text import CountedText
from rlhf.text.judge_model import judged_wins, open_judges
from rlhf.text.jury import Jury, jury_of
from rlhf.text.known_answers import AnsweredPrompt, Noise, as_responses, truly_answered
from rlhf.text.policy import response_logprobs
from rlhf.text.responses import Responses
from rlhf.text.reward_inputs import encode_response
from rlhf.text.samples import Sample, collate, samples_of
from trainers.data.batches import PromptBatch, build_batch
from trainers.data.conversation import as_conversation
from trainers.data.dataset import Dataset
from trainers.data.order import global_sample
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.suite import Measured, Parts, open_measured
from trainers.evaluation.suites.perplexity import chain_training_sets
from trainers.inference.generation import sampling_settings
from trainers.inference.rollouts import Sampled, SampleKey, WeightsVersion, generate_in_parts, response_uniforms
from trainers.runtime import distributed
from trainers.training.context import StageContext, model_folder, open_dataset, text_request

FORWARD_BATCH = 16
"""Rows of a forward pass."""
GENERATION_BATCH = 128


def measure_answers(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Let every model answer the prompts; with suite `comparison` compare the answers with the first model's and with
    the truth, next to noise. Collective.
    """
    judges = open_judges(spec, context)
    models, known, records = _answers(spec, context, labels, parts, judges)
    answers = [*models, *known]
    metrics = {"prompts": float(len(models[0].answers))}
    for model in answers:
        metrics |= generation_metrics(model)
    if "comparison" in spec.suites:
        metrics |= comparison_metrics(models, known, {name: term.weight for name, term in spec.rewards.items()})
        metrics |= judged_wins(judges, models, known, records, context)
    for finding in noise_findings(metrics):
        context.observer.notify(f"warning: {finding}")
    if context.ranks.rank == 0:
        metrics |= _counted(context, answers, records)
    return Measured(metrics, side_by_side(models, known, records, spec.num_samples))


def _answers(
    spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts, judges: Mapping[str, Judge]
) -> tuple[list[ModelAnswers], list[ModelAnswers], Sequence[Mapping[str, Any]]]:
    """Let every model answer, score all answers, and put all ranks' parts together; collective.

    Returns the models' answers, the reference answers, and the prompts' records.
    """
    tokenizations = [load_tokenization(model_folder(context, f"of.{index}")) for index in range(len(labels))]
    sets = _open_prompts(spec, context, tokenizations)
    drawn = shared_prompts(sets, spec.num_prompts, context.seed)
    first = open_measured(spec, context, "of.0", "language_model")
    jury = jury_of(spec, context, judges)
    juries = [jury(prompts, tokenization) for tokenization, prompts in zip(tokenizations, sets, strict=True)]
    found: list[ModelAnswers] = []
    for index, (label, tokenization, prompts) in enumerate(zip(labels, tokenizations, sets, strict=True)):
        place, rows = parts.place(index), drawn[index]
        model = first if index == 0 else open_measured(spec, context, f"of.{index}", "language_model")
        responses = _respond(spec, context, model, prompts, rows, drawn[0], tokenization, place)
        comparable = first if tokenization.contract_hash == tokenizations[0].contract_hash else None
        writer = _Writer(tokenization, juries[index], model, comparable)
        own = _judged(spec, context, responses, writer, place)
        # An answer is known by its place in the first model's set of prompts.
        renamed = dict(zip(rows, drawn[0], strict=True))
        lines = [{**line, "row": renamed[line["row"]]} for line in own]
        found.append(ModelAnswers(label, _gathered(lines, drawn[0])))
    own_rows = slice(context.ranks.rank, None, context.ranks.world_size)
    known: list[ModelAnswers] = []
    for label, answered in _known(spec, context, sets[0], found[0], tokenizations[0]).items():
        responses = as_responses(answered[own_rows], tokenizations[0].pad_id) if answered[own_rows] else None
        own = _judged(spec, context, responses, _Writer(tokenizations[0], juries[0]), place)
        answers = _gathered(own, drawn[0])
        if answers:
            known.append(ModelAnswers(label, answers, is_known=True))
    return found, known, sets[0].records


def _known(
    spec: Evaluate, context: StageContext, prompts: Dataset, start: ModelAnswers, tokenization: Tokenization
) -> dict[str, list[AnsweredPrompt]]:
    """The true answers to the prompts that have one, and noise for all; without a truth as long as the start's."""
    chance = Noise.of(tokenization, context.seed)
    truth: list[AnsweredPrompt] = []
    noise: list[AnsweredPrompt] = []
    for answer in start.answers:
        answered = truly_answered(answer.row, prompts.records[answer.row], spec.rewards, tokenization)
        if answered is not None and len(answered.answer) <= spec.sampling.max_new_tokens:
            truth.append(answered)
        else:
            encoded = encode_response(prompts.records[answer.row], answer.text, tokenization)
            answered = AnsweredPrompt.of(answer.row, encoded)
        noise.append(chance.like(answered))
    return {TRUTH: truth, NOISE: noise}


def _gathered(own: list[dict[str, Any]], rows: Sequence[int]) -> list[Answer]:
    """All ranks' answers in the order of the prompts; collective."""
    places = {row: place for place, row in enumerate(rows)}
    merged = [Answer(**line) for part in distributed.gather_json(own) for line in part]
    return sorted(merged, key=lambda line: places[line.row])


def _counted(
    context: StageContext, answers: Sequence[ModelAnswers], records: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Each writer's answers by the text that the first model's chain learnt from, where the store has it."""
    tokenization = load_tokenization(model_folder(context, "of.0"))
    counted = CountedText.of(chain_training_sets(context.inputs["of.0"], context.store), tokenization)
    if counted is None:
        return {}
    return {
        f"{writer.label}.{name}": value
        for writer in answers
        for name, value in counted.measures(
            [records[answer.row] for answer in writer.answers], [answer.text for answer in writer.answers]
        ).items()
    }


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

    def watch(share: float) -> None:
        context.observer.phase("answer", rows=int(share * len(drawn)), rows_planned=len(drawn), **place)

    asked, known_as = [(row, 0) for row in drawn[own]], [(key, 0) for key in keys[own]]
    samples = draw_samples(context, model, prompts, asked, known_as, spec.sampling, tokenization, watch)
    return collate(samples, tokenization.pad_id) if samples else None


@torch.no_grad()
def draw_samples(
    context: StageContext,
    model: nn.Module,
    prompts: Dataset,
    asked: Sequence[SampleKey],
    known_as: Sequence[SampleKey],
    sampling: Sampling,
    tokenization: Tokenization,
    watch: Callable[[float], None],
) -> list[Sample]:
    """Let a model answer prompts, of which each is a row and which of its draws this is; `known_as` keys the draws."""
    if not asked:
        return []
    rows = [row for row, _ in asked]
    batch = build_batch(prompts, rows)
    assert isinstance(batch, PromptBatch)
    settings = sampling_settings(tokenization, sampling.max_new_tokens, sampling.temperature, sampling.stop_tokens)
    uniforms_BR = response_uniforms(context.seed, "evaluate", 0, known_as, settings.max_new_tokens)
    prompts_here = batch.to(context.ranks.device)
    written = generate_in_parts(model, prompts_here, settings, uniforms_BR, GENERATION_BATCH, watch)
    drawn = Sampled.of(written, WeightsVersion(0, 0))
    ids = [prompts.records[row]["id"] for row in rows]
    return samples_of(prompts_here, asked, drawn, ids, tokenization.decode)


@dataclass(frozen=True)
class _Writer:
    """What wrote the answers that are judged, and what judges them."""

    tokenization: Tokenization
    jury: Jury
    model: nn.Module | None = None
    """None: no model wrote them."""
    first: nn.Module | None = None
    """The model that KL is taken against; None: it reads other tokens, or was asked by another template."""


@torch.no_grad()
def _judged(
    spec: Evaluate, context: StageContext, responses: Responses | None, writer: _Writer, place: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Lines of `Answer` fields: what was written, its KL against the first model, its rewards by term."""
    if responses is None:
        return []
    responses = responses.to(context.ranks.device)
    lines: list[dict[str, Any]] = []
    count, workers, num_tokens = len(responses.sample_ids_B), context.ranks.world_size, writer.tokenization.vocab_size
    for start in range(0, count, FORWARD_BATCH):
        context.observer.phase("judge", rows=start * workers, rows_planned=count * workers, **place)
        part = responses.rows(range(start, min(start + FORWARD_BATCH, count)))
        model, first = writer.model, writer.first
        kl: list[float | None] = [None if model is None or first is not model else 0.0] * len(part.sample_ids_B)
        kl_k3 = kl
        if model is not None and first is not None and first is not model:
            own_BR = response_logprobs(model, part, spec.sampling.temperature, num_tokens)
            first_BR = response_logprobs(first, part, spec.sampling.temperature, num_tokens)
            kl = k1(own_BR, first_BR).double().sum(dim=1).tolist()
            kl_k3 = k3(own_BR, first_BR).double().sum(dim=1).tolist()
        values = {name: value_B.tolist() for name, value_B in writer.jury.rewards(part).items()}
        for at, tokens in enumerate(part.action_ids):
            row, text = int(part.sample_ids_B[at]), writer.tokenization.decode(tokens, skip_special=True)
            answer = Answer(row, tokens, bool(part.ended_B[at]), text, kl[at], kl_k3[at])
            lines.append({**vars(answer), "rewards": {name: column[at] for name, column in values.items()}})
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
