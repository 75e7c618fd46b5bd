"""Sampling responses: the seam to whatever engine samples, and the one that samples on the training ranks.

Shapes: B responses, P prompt tokens, R response tokens.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from trainers.data.batches import PromptBatch
from trainers.engine.protocol import Engine
from trainers.inference.generation import Generation, SamplingSettings, generate
from trainers.runtime.distributed import broadcast_json, rank
from trainers.runtime.observer import Watch, partly

GENERATION_BATCH = 256
"""Responses that one rank writes side by side."""

SampleKey = tuple[int, ...]
"""Sample id of a prompt, which of the iteration's draws for it, and past a conversation's first turn the turn."""
StopReason = Literal["stop", "length", "turns"]
"""stop: an end token or another stop token; length: `max_new_tokens`; turns: the most that a conversation may have."""


@dataclass(frozen=True)
class WeightsVersion:
    """Which policy: the iteration it samples for, the optimiser steps that made it, and what these made."""

    iteration: int
    steps_applied: int
    digest: str = ""
    """`weights_digest` of the parameters that it samples by; empty where it was not computed."""


@dataclass(frozen=True)
class Sampled:
    """Responses to prompts, right-padded with the pad id to the longest one allowed, and what wrote them."""

    tokens_BR: Tensor
    response_mask_BR: Tensor
    """True at response tokens, the stop token included."""
    logprobs_BR: Tensor
    """Of the drawn tokens as the sampler saw them, at its temperature, in fp32; 0 past a response's end."""
    stop_reasons: tuple[StopReason, ...]
    version: WeightsVersion

    @staticmethod
    def of(drawn: Generation, version: WeightsVersion) -> "Sampled":
        """What `generate` drew."""
        reasons: list[StopReason] = ["stop" if has_ended else "length" for has_ended in drawn.ended_B.tolist()]
        return Sampled(drawn.tokens_BR, drawn.response_mask_BR, drawn.logprobs_BR, tuple(reasons), version)


class RolloutEngine(Protocol):
    """Samples from the policy; which process does so, and how it draws, is its own affair."""

    def sync(self, iteration: int) -> WeightsVersion:
        """Take over the learner's weights and say which they are; collective."""

    def generate(
        self, prompts: PromptBatch, keys: Sequence[SampleKey], sampling: SamplingSettings, watch: Watch
    ) -> Sampled:
        """Answer this rank's left-padded prompts, a response for each; `watch` may end it. Collective at its ends.

        A turn of conversations may find none of them left on this rank.

        Equal keys give equal responses of the same weights where the engine can promise that.
        """


class SamplingModule(Protocol):
    """A module with a policy that can be sampled from."""

    def sampling(self) -> AbstractContextManager[nn.Module]:
        """Give the policy's network to generate from, every parameter being whole."""

    def policy_names(self) -> list[str]:
        """Names of the parameters that learn and that the policy samples by."""


class LocalRollouts:
    """Samples on the training ranks from the engine's own parameters: nothing is sent, and no weights are compared."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._seed = seed
        self._version = WeightsVersion(-1, -1)

    def sync(self, iteration: int) -> WeightsVersion:
        """Remember which they are; the weights are in place."""
        engine = self._engine
        names = cast(SamplingModule, engine.module).policy_names()
        self._version = WeightsVersion(iteration, engine.steps_applied, weights_digest(engine.full_parameters(names)))
        return self._version

    def generate(
        self, prompts: PromptBatch, keys: Sequence[SampleKey], sampling: SamplingSettings, watch: Watch
    ) -> Sampled:
        """Sample under the actor's adapter, every parameter in place; a key's uniform numbers draw its tokens."""
        uniforms_BR = response_uniforms(self._seed, "rollout", self._version.iteration, keys, sampling.max_new_tokens)
        with self._engine.gathered() as module, torch.no_grad(), cast(SamplingModule, module).sampling() as actor:
            drawn = generate_in_parts(actor, prompts, sampling, uniforms_BR, GENERATION_BATCH, watch)
        return Sampled.of(drawn, self._version)


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and values of parameters; taken on rank 0, known to all. Collective."""
    hashes = []
    for name, tensor in parameters:
        if rank() == 0:
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            hashes.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    digest = hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()
    return str(broadcast_json(digest))


def response_uniforms(seed: int, stream: str, round_: int, keys: Sequence[SampleKey], width: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of each response, keyed by (seed, stream, round, key) alone."""
    rows = []
    for key_of_sample in keys:
        text = "\n".join(map(str, (seed, stream, round_, *key_of_sample)))
        key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(width))
    return np.stack(rows) if rows else np.empty((0, width))


def generate_in_parts(
    module: nn.Module,
    prompts: PromptBatch,
    settings: SamplingSettings,
    uniforms_BR: np.ndarray,
    batch_size: int,
    watch: Watch | None = None,
) -> Generation:
    """Sample a response to every prompt, `batch_size` at a time; the module holds all its parameters."""
    parts, count = [], len(uniforms_BR)
    if not count:
        nothing = torch.zeros(0, settings.max_new_tokens, dtype=torch.int64, device=prompts.input_ids_BP.device)
        return Generation(nothing, nothing.bool(), nothing.bool().any(dim=1), nothing.float())
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        ids, mask = prompts.input_ids_BP[rows], prompts.attention_mask_BP[rows]
        part = None if watch is None else partly(watch, start, len(ids), count)
        parts.append(generate(module, ids, mask, settings, uniforms_BR[rows], watch=part))
    return Generation(
        torch.cat([part.tokens_BR for part in parts]),
        torch.cat([part.response_mask_BR for part in parts]),
        torch.cat([part.ended_B for part in parts]),
        torch.cat([part.logprobs_BR for part in parts]),
    )
