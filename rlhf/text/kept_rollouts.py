"""Rollouts that the store keeps, as a person reads them: token by token, with the log-ratio to the policy's start."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from recipes.errors import RequestError
from recipes.stages.rl import RlText
from rlhf.text.answers import FORWARD_BATCH
from rlhf.text.policy import response_logprobs
from rlhf.text.samples import Sample, collate, unpack
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.suite import open_measured
from trainers.training.context import StageContext, model_folder, open_dataset, text_request

WINDOW = 4
"""Tokens before one that decide how it is written."""


def chosen_iterations(there: Sequence[int], samples: int, most: int) -> list[int]:
    """Iterations to show of those that are there, evenly, the first and the last among them: of so many samples each,
    at most so many in all.
    """
    count = max(1, min(len(there), most // max(samples, 1)))
    if count == 1:
        return [there[-1]]
    return sorted({there[round(place * (len(there) - 1) / (count - 1))] for place in range(count)})


def read_rollouts(spec: RlText, context: StageContext, most: int, *, log_ratios: bool) -> dict[str, Any]:
    """Return the stage's kept samples for a page: `prompts` as tokens, `asked`, the same as their source has them, and
    `samples`, each with tokens and a value at each. Of conversations with an environment there is no `asked`.

    A value is the log-ratio of an action, the sampler's log-probability less that of the policy's start; without
    `log_ratios`, for which the start reads every sample, the sampler's log-probability.
    """
    there = context.store.list_rollouts(context.run, context.stage)
    if not there:
        raise RequestError(f"{context.run}/{context.stage} has no kept rollouts (rollout.keep)")
    tokenization = load_tokenization(model_folder(context, "actor"))
    start = open_measured(spec, context, "actor", "language_model") if log_ratios else None
    prompts: dict[str, int] = {}
    first_rows: list[int] = []
    shown: list[dict[str, Any]] = []
    iterations = chosen_iterations(there, len(_kept(context, there[0])), most)
    for iteration in iterations:
        samples = _kept(context, iteration)
        context.observer.phase("read", rows=len(shown))
        values = [sample.logprobs for sample in samples]
        if start is not None:
            values = _ratios(spec, start, samples, tokenization)
        for sample, values_A in zip(samples, values, strict=True):
            first = int(sample.actions.argmax())
            prompt = tokenization.decode(sample.tokens[:first], skip_special=False)
            place = prompts.setdefault(prompt, len(prompts))
            if place == len(first_rows):
                first_rows.append(sample.row)
            shown.append(_line(iteration, place, sample, values_A, tokenization, first))
    asked = None if spec.environment is not None else _asked(spec, context, tokenization, first_rows)
    return {"prompts": list(prompts), "asked": asked, "iterations": iterations, "kept": len(there), "samples": shown}


def _asked(
    spec: RlText, context: StageContext, tokenization: Tokenization, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """The prompts of rows as their source has them: what a labelled pair names."""
    source, length = spec.get_source("prompts"), spec.rollout.max_prompt_tokens
    records = open_dataset(context, text_request(context, source, tokenization, length, spec.template)).records
    return [{"prompt": records[row]["prompt"], "source": records[row]["id"]} for row in rows]


def _kept(context: StageContext, iteration: int) -> list[Sample]:
    kept = context.store.find_rollouts(context.run, context.stage, iteration)
    return [] if kept is None else unpack(context.store.objects.get_bytes(kept.files["samples.safetensors"].sha256))


@torch.no_grad()
def _ratios(
    spec: RlText, start: torch.nn.Module, samples: Sequence[Sample], tokenization: Tokenization
) -> list[np.ndarray]:
    """[A] of each sample: the sampler's log-probability of an action less the start's."""
    found: list[np.ndarray] = []
    device = next(start.parameters()).device
    for at in range(0, len(samples), FORWARD_BATCH):
        part = samples[at : at + FORWARD_BATCH]
        batch = collate(part, tokenization.pad_id, device)
        start_BA = response_logprobs(start, batch, spec.rollout.temperature, tokenization.vocab_size)
        rows = start_BA.float().cpu().numpy()
        found += [one.logprobs - row[: len(one.logprobs)] for one, row in zip(part, rows, strict=True)]
    return found


def _line(
    iteration: int, prompt: int, sample: Sample, values_A: np.ndarray, tokenization: Tokenization, first: int
) -> dict[str, Any]:
    """A sample for the page; observations of an environment have no value."""
    values = iter(values_A.tolist())
    is_action = sample.actions[first:].tolist()
    pieces = pieces_of(sample.tokens[first:].tolist(), tokenization)
    tokens = [[text, round(next(values), 3)] if acts else [text] for text, acts in zip(pieces, is_action, strict=True)]
    rewards = {name: round(value, 4) for name, value in sample.rewards.items()}
    total = round(float(values_A.sum()), 3)
    return {
        "iteration": iteration, "prompt": prompt, "draw": sample.occurrence, "stop": sample.stop_reason,
        "rewards": rewards, "sum": total, "length": len(values_A), "tokens": tokens,
        "answer": sample.text,
    }  # fmt: skip


def pieces_of(ids: Sequence[int], tokenization: Tokenization) -> Iterator[str]:
    """What each token adds to the text; of a character of several tokens the last one adds it."""
    for at in range(len(ids)):
        begin = max(0, at - WINDOW)
        before = tokenization.decode(ids[begin:at], skip_special=False).rstrip("\ufffd")
        yield tokenization.decode(ids[begin : at + 1], skip_special=False)[len(before) :].rstrip("\ufffd")
