"""The evaluate stage: held-out perplexity, answers to held-out prompts, and their comparison by reward models; what
encoder-decoders write of held-out targets, and what models of pictures draw.

Shapes: B samples, P prompt tokens, R response tokens, T tokens of both.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from recipes.errors import RequestError
from recipes.rules.report import report_labels, unmeasured
from recipes.stages.evaluate import Evaluate
from rlhf.algorithms.kl import k1, k3
from rlhf.experience import Responses
from rlhf.text.policy import response_logprobs
from rlhf.text.ppo_stage import reading_by
from rlhf.text.reward_inputs import Reading
from rlhf.text.reward_model import ScoreModel
from rlhf.text.rollout import answer, response_uniforms
from rlhf.text_metrics import (
    Answer,
    ModelAnswers,
    comparison_metrics,
    failed_bounds,
    generation_metrics,
    side_by_side,
    written_side_by_side,
)
from trainers.data.batches import PromptBatch, build_batch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.materialise import find_dataset
from trainers.data.order import global_sample
from trainers.data.streams import HeldOutStream, beginning
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.held_out import evaluate, perplexity
from trainers.evaluation.ngram import ngram_perplexity
from trainers.evaluation.seq2seq import measure_targets
from trainers.inference.generation import sampling_settings
from trainers.models.load import ModelKind, head_name, model_family
from trainers.models.stack import load_exact
from trainers.models.token_losses import CarriedTokenLosses, TokenLosses
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store
from trainers.training import distributed
from trainers.training.context import (
    Draft,
    StageContext,
    data_request,
    draft_folder,
    model_folder,
    model_weights,
    open_dataset,
)
from trainers.training.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.training.objectives.language_model import LanguageModelObjective
from trainers.training.observer import counted
from trainers.training.precision import dtype_of, use_fast_matmul

FORWARD_BATCH = 16
"""Rows of a forward pass."""
GENERATION_BATCH = 128


def run_evaluate(spec: Evaluate, context: StageContext) -> Draft | None:
    """Measure models; the draft of the report comes from rank 0. Collective."""
    use_fast_matmul(context.ranks.device)
    labels = report_labels(spec.of)
    _demand_measured(spec, context)
    metrics: dict[str, float] = {}
    if "perplexity" in spec.suites:
        for index, label in enumerate(labels):
            metrics |= {f"{label}.{name}": value for name, value in _perplexity(spec, context, index).items()}
    samples: list[dict[str, Any]] = []
    if "generation" in spec.suites or "comparison" in spec.suites:
        answers, samples = _answers(spec, context, labels)
        for model in answers:
            metrics |= generation_metrics(model)
        if "comparison" in spec.suites:
            metrics |= comparison_metrics(answers)
        metrics["prompts"] = float(len(answers[0].answers))
    if "targets" in spec.suites:
        metrics, written = measure_targets(spec, context, labels)
        samples = written_side_by_side(written, spec.num_samples)
    if "images" in spec.suites:
        from trainers.evaluation.images import measure_pictures

        metrics, samples = measure_pictures(spec, context, labels)
    context.observer.metrics(0, {name: value for name, value in metrics.items() if math.isfinite(value)})
    context.observer.phase("write")
    return _write_draft(spec, context, metrics, samples)


def _demand_measured(spec: Evaluate, context: StageContext) -> None:
    """Raise RequestError for a model of text that the suites do not measure."""
    if "images" in spec.suites:
        return
    for index in range(len(spec.of)):
        found = unmeasured(model_family(model_folder(context, f"of.{index}")), spec.suites)
        if found is not None:
            raise RequestError(f"of.{index} {spec.of[index]}: {found}")


def _num_parts(spec: Evaluate) -> int:
    """Every model is measured on the text, and lets itself be questioned, as the suites ask."""
    passes = ("perplexity" in spec.suites) + bool({"generation", "comparison"} & set(spec.suites))
    return passes * len(spec.of)


def _perplexity(spec: Evaluate, context: StageContext, index: int) -> dict[str, float]:
    """Perplexity of one model on the held-out text, and that of its counted baseline; collective."""
    folder, ranks, observer = model_folder(context, f"of.{index}"), context.ranks, context.observer
    place = {"step": index, "steps_planned": _num_parts(spec)}
    tokenization = load_tokenization(folder)
    is_carried = model_family(folder) == "rnn"
    request = data_request(context, spec.get_source("text"), tokenization, spec.sequence_length)
    dataset = open_dataset(context, replace(request, is_stream=is_carried))
    rows = min(spec.num_sequences or spec.num_prompts, len(dataset))
    model: Any = _load(spec, context, f"of.{index}", "language_model")
    if is_carried:
        if rows < len(dataset):
            dataset = beginning(dataset, rows, spec.sequence_length)
        share = {"length": spec.sequence_length, "workers": ranks.world_size, "rank": ranks.rank}
        stream = HeldOutStream(dataset, model.base_model.zero_state, **share)
        batches = counted(stream, observer, "perplexity", rows, **place)
        means = evaluate(CarriedTokenLosses(model), CarriedLanguageModelObjective(), batches, ranks.device)
    else:
        read = evaluation_batches(dataset, rows, ranks.world_size, ranks.rank, FORWARD_BATCH)
        shown = counted(read, observer, "perplexity", rows, **place)
        means = evaluate(TokenLosses(model), LanguageModelObjective(), shown, ranks.device)
    found = {"perplexity": perplexity(means["loss"])}
    training_sets = chain_training_sets(context.inputs[f"of.{index}"], context.store)
    if training_sets:
        observer.phase("ngram", **place)
        counted_rows = None if is_carried else rows
        found["ngram_perplexity"] = ngram_perplexity(training_sets, dataset, counted_rows, tokenization.vocab_size)
    return found


def chain_training_sets(model: ArtifactManifest, store: Store) -> list[Dataset]:
    """Return the sets of text that a model and those it was made from learnt from, from the first on.

    Empty where a link of the chain says nothing of its text, or the store has let it go: what is left of a chain would
    make a baseline that saw less than the model. PPO learns from no text of its own.
    """
    found: list[Dataset] = []
    current: ArtifactManifest | None = model
    while current is not None:
        digest = current.metrics.get("training_set")
        dataset = find_dataset(digest, store) if isinstance(digest, str) else None
        if dataset is not None:
            found.insert(0, dataset)
        elif "actor" not in current.parents:
            return []
        start = current.parents.get("init_from") or current.parents.get("actor")
        if start is None:
            return found
        current = store.find_artifact(start.fingerprint)
    return []


def _answers(
    spec: Evaluate, context: StageContext, labels: Sequence[str]
) -> tuple[list[ModelAnswers], list[dict[str, Any]]]:
    """Let every model answer, score the answers, and put all ranks' parts together; collective."""
    first_tokenization = load_tokenization(model_folder(context, "of.0"))
    first = _load(spec, context, "of.0", "language_model")
    scorers = [(path, _scorer(spec, context, path)) for path in ("reward", "second_scorer") if path in context.inputs]
    found: list[ModelAnswers] = []
    texts: dict[str, list[str]] = {}
    for index, label in enumerate(labels):
        planned = _num_parts(spec)
        place = {"step": planned - len(labels) + index, "steps_planned": planned}
        tokenization = load_tokenization(model_folder(context, f"of.{index}"))
        prompts = open_dataset(
            context,
            data_request(
                context, spec.get_source("prompts"), tokenization, spec.sampling.max_prompt_tokens, spec.template
            ),
        )
        model = first if index == 0 else _load(spec, context, f"of.{index}", "language_model")
        responses = _respond(spec, context, model, prompts, tokenization, place)
        comparable = first if tokenization.contract_hash == first_tokenization.contract_hash else None
        judges = [(scorer, reading_by(context, path, prompts, tokenization)) for path, scorer in scorers]
        own = _judged(spec, context, responses, model, comparable, judges, tokenization.vocab_size, place)
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
    responses, _ = answer(model, batch.to(context.ranks.device), settings, uniforms_BR, GENERATION_BATCH, watch)
    return responses


@torch.no_grad()
def _judged(
    spec: Evaluate,
    context: StageContext,
    responses: Responses | None,
    model: nn.Module,
    first: nn.Module | None,
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
        kl: list[float | None] = [0.0 if first is model else None] * len(part.sample_ids_B)
        kl_k3 = kl
        if first is not None and first is not model:
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


def _load(spec: Evaluate, context: StageContext, field_path: str, kind: ModelKind) -> nn.Module:
    """A model in evaluation mode on this rank's device; its adapters stay apart where rounding would take of them."""
    device = context.ranks.device
    context.observer.phase("model")
    weights = model_weights(context, field_path)
    model: nn.Module = load_exact(weights, kind, device=device, dtype=dtype_of(spec.shard.precision))
    return model.to(device).eval().requires_grad_(False)


def _scorer(spec: Evaluate, context: StageContext, field_path: str) -> ScoreModel:
    network = _load(spec, context, field_path, "score_model")
    return ScoreModel(network, head_name(network)).eval()


def _write_draft(
    spec: Evaluate, context: StageContext, metrics: dict[str, float], samples: list[dict[str, Any]]
) -> Draft | None:
    """Upload the report, and show its samples in the run's folder."""
    if context.ranks.rank != 0:
        return None
    finite = {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)}
    reasons = failed_bounds(spec.gates, finite)
    writer = context.samples()
    for line in samples:
        writer.append(line)
    writer.flush()
    with draft_folder() as folder:
        for name, content in (("report.json", finite), ("samples.json", samples)):
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
        files = context.store.objects.put_folder(folder)
    return Draft(
        kind="report",
        files=files,
        checks=(),
        outcome={"state": "completed", "rule": None, "steps_done": 0, "steps_planned": 0},
        metrics=finite,
        gate_reasons=tuple(reasons),
    )
