"""Generating responses: the seam to whatever engine samples, and the implementation that samples on the training ranks.

Shapes: B prompts, P prompt tokens, R response tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.experience import Responses, join_responses
from rlhf.invariants import WeightsVersion
from rlhf.text.policy import PolicyModels
from trainers.data.batches import PromptBatch
from trainers.engine.protocol import Engine
from trainers.inference.generation import SamplingSettings, generate
from trainers.runtime.observer import Watch, partly

GENERATION_BATCH = 256
"""Responses that one rank writes side by side."""


SampleKey = tuple[int, int]
"""Sample id of a prompt, and which of the iteration's draws for that prompt."""


@dataclass(frozen=True)
class Rollouts:
    """Responses and the policy that wrote them."""

    responses: Responses
    logprobs_BR: Tensor
    """Of the drawn tokens as the sampler saw them, at its temperature; 0 past a response's end."""
    version: WeightsVersion


class RolloutEngine(Protocol):
    """Samples from the policy; which process does so is its own affair."""

    def sync(self, iteration: int) -> WeightsVersion:
        """Take over the learner's weights and say which they are; collective."""

    def generate(self, prompts: PromptBatch, keys: Sequence[SampleKey], watch: Watch) -> Rollouts:
        """Answer this rank's prompts, each response drawn by its key; `watch` may end it. Collective before and after.

        Equal keys give equal responses where the engine can promise that.
        """


class ColocatedRollouts:
    """Samples on the training ranks from the engine's own parameters: nothing is sent, and no weights are compared."""

    def __init__(self, engine: Engine, settings: SamplingSettings, seed: int) -> None:
        self._engine = engine
        self._settings = settings
        self._seed = seed
        self._iteration = -1

    def sync(self, iteration: int) -> WeightsVersion:
        """Remember the iteration; the weights are in place."""
        self._iteration = iteration
        return WeightsVersion(iteration, self._engine.steps_applied)

    def generate(self, prompts: PromptBatch, keys: Sequence[SampleKey], watch: Watch) -> Rollouts:
        """Sample under the actor's adapter, every parameter in place; a key's uniform numbers draw its tokens."""
        width = self._settings.max_new_tokens
        uniforms_BR = response_uniforms(self._seed, "rollout", self._iteration, keys, width)
        with self._engine.gathered() as module, torch.no_grad():
            assert isinstance(module, PolicyModels)
            with module.sampling() as actor:
                responses, logprobs_BR = answer(actor, prompts, self._settings, uniforms_BR, GENERATION_BATCH, watch)
        return Rollouts(responses, logprobs_BR, WeightsVersion(self._iteration, self._engine.steps_applied))


def response_uniforms(seed: int, stream: str, round_: int, keys: Sequence[SampleKey], width: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of each response, keyed by (seed, stream, round, sample id, draw) alone."""
    rows = []
    for sample, draw in keys:
        text = f"{seed}\n{stream}\n{round_}\n{sample}\n{draw}"
        key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(width))
    return np.stack(rows) if rows else np.empty((0, width))


def draw_keys(rows: Sequence[int], own: range, samples_per_prompt: int) -> list[SampleKey]:
    """The (sample id, draw) of each response to a rank's `own` places among an iteration's prompts `rows`.

    Draws of a prompt are counted over the whole iteration: one that comes again gets other responses.
    """
    seen: Counter[int] = Counter()
    keys: list[SampleKey] = []
    for place, row in enumerate(rows):
        if place in own:
            keys += [(row, seen[row] + draw) for draw in range(samples_per_prompt)]
        seen[row] += samples_per_prompt
    return keys


def repeated_prompts(prompts: PromptBatch, samples_per_prompt: int) -> PromptBatch:
    """Each prompt as often as it is answered."""
    return PromptBatch(
        input_ids_BP=prompts.input_ids_BP.repeat_interleave(samples_per_prompt, dim=0),
        attention_mask_BP=prompts.attention_mask_BP.repeat_interleave(samples_per_prompt, dim=0),
        sample_ids_B=prompts.sample_ids_B.repeat_interleave(samples_per_prompt, dim=0),
    )


def answer(
    module: torch.nn.Module,
    prompts: PromptBatch,
    settings: SamplingSettings,
    uniforms_BR: np.ndarray,
    batch_size: int,
    watch: Watch | None = None,
) -> tuple[Responses, Tensor]:
    """Sample a response to every prompt, `batch_size` at a time; the module holds all its parameters.

    Returns the sampler's log-probabilities [B, R] of the drawn tokens too, R being the longest response allowed.
    """
    parts, count = [], len(uniforms_BR)
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        ids, mask = prompts.input_ids_BP[rows], prompts.attention_mask_BP[rows]
        part = None if watch is None else partly(watch, start, len(ids), count)
        parts.append(generate(module, ids, mask, settings, uniforms_BR[rows], watch=part))
    responses = join_responses(
        prompts.input_ids_BP,
        prompts.attention_mask_BP,
        torch.cat([part.tokens_BR for part in parts]),
        torch.cat([part.response_mask_BR for part in parts]),
        torch.cat([part.ended_B for part in parts]),
        prompts.sample_ids_B,
    )
    return responses, torch.cat([part.logprobs_BR for part in parts])
