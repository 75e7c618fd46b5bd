"""Generating responses: the seam to whatever engine samples, and the implementation that samples on the training ranks.

Shapes: B prompts, P prompt tokens, R response tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rlhf.experience import Responses, join_responses
from rlhf.invariants import WeightsVersion, weights_digest
from rlhf.models import PolicyModels
from trainers.data.batches import PromptBatch
from trainers.engine.protocol import Engine
from trainers.generation import SamplingSettings, Watch, generate

GENERATION_BATCH = 256
"""Responses that one rank writes side by side."""


@dataclass(frozen=True)
class Rollouts:
    """Responses and the policy that wrote them."""

    responses: Responses
    version: WeightsVersion


class RolloutEngine(Protocol):
    """Samples from the policy; which process does so is its own affair."""

    def sync(self, iteration: int) -> WeightsVersion:
        """Take over the learner's weights and say which they are; collective."""

    def generate(self, prompts: PromptBatch, uniforms_BR: np.ndarray) -> Rollouts:
        """Answer this rank's prompts, one uniform number per token; collective."""


class ColocatedRollouts:
    """Samples on the training ranks from the engine's own parameters, so that there is nothing to send."""

    def __init__(self, engine: Engine, trained: Sequence[str], base_digest: str, settings: SamplingSettings) -> None:
        self._engine = engine
        self._trained = tuple(trained)
        self._base_digest = base_digest
        self._settings = settings
        self._version = WeightsVersion(-1, "")

    def sync(self, iteration: int) -> WeightsVersion:
        """Digest the parameters that sampling will use."""
        trained = self._engine.full_parameters(self._trained)
        self._version = WeightsVersion(iteration, weights_digest(trained, self._base_digest))
        return self._version

    def generate(self, prompts: PromptBatch, uniforms_BR: np.ndarray) -> Rollouts:
        """Sample under the actor's adapter, every parameter in place."""
        with self._engine.gathered() as module, torch.no_grad():
            assert isinstance(module, PolicyModels)
            with module.sampling() as actor:
                responses = answer(actor, prompts, self._settings, uniforms_BR, GENERATION_BATCH)
        return Rollouts(responses, self._version)


def response_uniforms(seed: int, stream: str, round_: int, keys: Sequence[tuple[int, int]], width: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of each response, keyed by (seed, stream, round, sample id, draw) alone."""
    rows = []
    for sample, draw in keys:
        text = f"{seed}\n{stream}\n{round_}\n{sample}\n{draw}"
        key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(width))
    return np.stack(rows) if rows else np.empty((0, width))


def repeated_prompts(prompts: PromptBatch, samples_per_prompt: int) -> tuple[PromptBatch, list[tuple[int, int]]]:
    """Each prompt as often as it is answered, and the (sample id, draw) of every row."""
    keys = [(int(sample), draw) for sample in prompts.sample_ids_B for draw in range(samples_per_prompt)]
    if samples_per_prompt == 1:
        return prompts, keys
    repeated = PromptBatch(
        input_ids_BP=prompts.input_ids_BP.repeat_interleave(samples_per_prompt, dim=0),
        attention_mask_BP=prompts.attention_mask_BP.repeat_interleave(samples_per_prompt, dim=0),
        sample_ids_B=prompts.sample_ids_B.repeat_interleave(samples_per_prompt, dim=0),
    )
    return repeated, keys


def answer(
    module: torch.nn.Module,
    prompts: PromptBatch,
    settings: SamplingSettings,
    uniforms_BR: np.ndarray,
    batch_size: int,
    watch: Watch | None = None,
) -> Responses:
    """Sample a response to every prompt, `batch_size` at a time; the module holds all its parameters."""
    parts, count = [], len(uniforms_BR)
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        ids, mask = prompts.input_ids_BP[rows], prompts.attention_mask_BP[rows]
        part = None if watch is None else _of_part(watch, start, len(ids), count)
        parts.append(generate(module, ids, mask, settings, uniforms_BR[rows], watch=part))
    return join_responses(
        prompts.input_ids_BP,
        prompts.attention_mask_BP,
        torch.cat([part.tokens_BR for part in parts]),
        torch.cat([part.response_mask_BR for part in parts]),
        torch.cat([part.ended_B for part in parts]),
        prompts.sample_ids_B,
    )


def _of_part(watch: Watch, start: int, size: int, count: int) -> Watch:
    """Hears of rows [start, start + size) of `count` and tells of all of them."""
    return lambda share: watch((start + share * size) / count)
