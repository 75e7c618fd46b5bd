"""Conversations with an environment: the policy's turns, the observations between them, and the rewards.

What was drawn stays as it was drawn: an observation is put after it as further tokens, and nothing is encoded again.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recipes.errors import StageError
from recipes.stages.environments import TERM, AnyEnvironment
from rlhf.environments.protocol import Environment, MakeEnvironment, Step
from rlhf.text.samples import Sample
from trainers.data.batches import PromptBatch, pad
from trainers.data.encoding import render_prompt
from trainers.data.tokenizer import Tokenization
from trainers.inference.rollouts import Sampled, SampleKey

Generate = Callable[[PromptBatch, Sequence[SampleKey]], Sampled]
"""Answers this rank's prompts, of which there may be none; collective."""


@dataclass(frozen=True)
class Observer:
    """How what the environment says becomes tokens after a turn of the policy."""

    tokenization: Tokenization
    role: str
    longest: int
    """Most tokens of an observation."""

    def tokens(self, prompt: Any, turn: Sequence[int], text: str) -> list[int]:
        """What follows a turn, which began with `prompt`: plain text as it is, or the turn's end and a further turn.

        Of a text that is too long the beginning is kept. Raises StageError where nothing of it would fit.
        """
        ids = self._whole(prompt, turn, text)
        written = self.tokenization.encode(text)
        while len(ids) > self.longest:
            excess = len(ids) - self.longest
            if excess >= len(written):
                raise StageError(
                    f"environment.max_observation_tokens is {self.longest}, and the chat template alone writes "
                    f"{len(self._whole(prompt, turn, ''))} tokens between two turns of the policy"
                )
            written = written[: len(written) - excess]
            ids = self._whole(prompt, turn, self.tokenization.decode(written))
        return ids

    def _whole(self, prompt: Any, turn: Sequence[int], text: str) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenization.encode(text)
        rest = self.tokenization.after_answer(self.role, text)
        end = self.tokenization.decode([turn[-1]], skip_special=False) if turn else ""
        if turn and turn[-1] in self.tokenization.end_ids and rest.startswith(end):
            rest = rest[len(end) :]
        return self.tokenization.encode(rest)


@dataclass(frozen=True)
class Episodes:
    """Plays conversations of all of a rank's prompts side by side, turn by turn."""

    spec: AnyEnvironment
    make: MakeEnvironment
    observer: Observer
    records: Sequence[Mapping[str, Any]]
    """Of the prompts, by row."""

    def play(
        self, started: Sequence[Sample], generate: Generate, goes_on: Callable[[int], bool] = bool
    ) -> list[Sample]:
        """From samples that hold their prompts alone to whole conversations; collective where `generate` is.

        `goes_on` is called after each turn with the number of unfinished conversations on this rank; it returns whether
        any rank has one.

        A conversation ends where the environment says so (`stop`), in a turn that the length limit cuts off
        (`length`), or after the last turn allowed (`turns`). Raises StageError for an environment that fails.
        """
        worlds = [self.make() for _ in started]
        samples = [self._opened(sample, world) for sample, world in zip(started, worlds, strict=True)]
        live = list(range(len(samples)))
        for turn in range(self.spec.turns):
            keys = [_key(samples[place], turn) for place in live]
            drawn = generate(self._prompts([samples[place] for place in live]), keys)
            going = []
            for at, place in enumerate(live):
                samples[place], ids = acted(samples[place], drawn, at, self.observer.tokenization)
                step = self._step(samples[place], worlds[place])
                sample = samples[place] = rewarded(samples[place], step.reward)
                if step.done or sample.stop_reason == "length":
                    continue
                if turn + 1 == self.spec.turns:
                    samples[place] = replace(sample, stop_reason="turns")
                    continue
                told = self.observer.tokens(self.records[sample.row]["prompt"], ids, step.observation)
                samples[place] = observed(sample, told)
                going.append(place)
            live = going
            if not goes_on(len(live)):
                break
        return samples

    def _opened(self, sample: Sample, world: Environment) -> Sample:
        """The sample with what the environment says before the first turn, as a turn of the prompt."""
        record = self.records[sample.row]
        with _telling(self.spec):
            opening = world.reset(record.get("columns", {}))
        if not opening:
            return sample
        tokenization, prompt = self.observer.tokenization, record["prompt"]
        if isinstance(prompt, str):
            return observed(sample, tokenization.encode(opening))
        turns = [*prompt, {"role": self.observer.role, "content": opening}]
        ids = tokenization.encode(render_prompt(turns, tokenization, record.get("tools")).text)
        return replace(sample, tokens=np.array(ids, dtype=np.int32), actions=np.zeros(len(ids), dtype=np.bool_))

    def _step(self, sample: Sample, world: Environment) -> Step:
        with _telling(self.spec):
            step = world.step(sample.text)
            return Step(str(step.observation), float(step.reward), bool(step.done))

    def _prompts(self, samples: Sequence[Sample]) -> PromptBatch:
        if not samples:
            nothing = torch.zeros(0, 1, dtype=torch.int64)
            return PromptBatch(nothing, nothing.bool(), nothing[:, 0])
        tokens, pad_id = [sample.tokens.astype(np.int64) for sample in samples], self.observer.tokenization.pad_id
        ids, real = pad(tokens, pad_id, left=True)
        rows = torch.tensor([sample.row for sample in samples])
        return PromptBatch(torch.from_numpy(ids), torch.from_numpy(real), rows)


def acted(sample: Sample, drawn: Sampled, place: int, tokenization: Tokenization) -> tuple[Sample, list[int]]:
    """A sample with the turn that was drawn at a place, and the tokens of that turn."""
    is_written = drawn.response_mask_BR[place].cpu().numpy()
    ids = drawn.tokens_BR[place].cpu().numpy()[is_written]
    turn = replace(
        sample,
        tokens=np.concatenate([sample.tokens, ids]).astype(np.int32),
        actions=np.concatenate([sample.actions, np.ones(len(ids), dtype=np.bool_)]),
        logprobs=np.concatenate([sample.logprobs, drawn.logprobs_BR[place].cpu().numpy()[is_written]]),
        stop_reason=drawn.stop_reasons[place],
        version=drawn.version,
        text=tokenization.decode(ids.tolist(), skip_special=True),
    )
    return turn, ids.tolist()


def observed(sample: Sample, ids: Sequence[int]) -> Sample:
    """A sample with tokens that the policy did not choose."""
    return replace(
        sample,
        tokens=np.concatenate([sample.tokens, np.array(ids, dtype=np.int32)]).astype(np.int32),
        actions=np.concatenate([sample.actions, np.zeros(len(ids), dtype=np.bool_)]),
    )


def rewarded(sample: Sample, reward: float) -> Sample:
    """A sample with what the environment gave for its newest turn."""
    turns = (*sample.turn_rewards, (int(sample.actions.sum()), reward))
    total = float(sum(given for _, given in turns))
    return replace(sample, turn_rewards=turns, rewards={**sample.rewards, TERM: total})


def _key(sample: Sample, turn: int) -> SampleKey:
    """The first turn is drawn like a response without an environment."""
    return (sample.row, sample.occurrence) if turn == 0 else (sample.row, sample.occurrence, turn)


@contextmanager
def _telling(spec: AnyEnvironment) -> Iterator[None]:
    """Say of what an environment raises whose it was."""
    try:
        yield
    except Exception as error:
        told = "".join(traceback.format_exception(error)[-3:]).strip()
        raise StageError(f"environment {getattr(spec, 'name', '')}: it failed:\n{told}") from error
