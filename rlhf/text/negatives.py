"""Answers that a reward stage makes itself, and that are known to be worse than the chosen ones.

A reward model that has seen real sentences alone has no opinion of anything else: it may put noise, halves of answers,
or what a policy writes above the truth. Which pair gets which answer follows from seed, step and row.

Shapes: B pairs, T tokens.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from recipes.stages.reward import Negatives
from trainers.data.batches import BatchPlan, PairBatch, PromptBatch, SequenceBatch, pad_texts
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization
from trainers.inference.generation import sampling_settings
from trainers.inference.rollouts import GENERATION_BATCH, generate_in_parts, response_uniforms
from trainers.runtime import distributed
from trainers.runtime.observer import Watch

SAMPLES = "samples"


@dataclass(frozen=True)
class MadeAnswers:
    """Replaces rejected answers by made ones."""

    spec: Negatives
    dataset: Dataset
    ordinary: Sequence[int]
    """Tokens that noise is drawn from."""
    seed: int
    longest: int
    """Tokens of a prompt with an answer."""
    samples: Mapping[int, list[int]]
    """What the stage's start wrote, by row, without the end token."""

    def replaced(self, batch: PairBatch, step: int) -> PairBatch:
        """The batch with the rejected answers of this step; where none can be made, the data's own stays."""
        rows, rejected = batch.sample_ids_B.tolist(), batch.rejected
        made = [self._made(row, step) for row in rows]
        if not any(made):
            return batch
        ids: list[np.ndarray] = []
        responses: list[np.ndarray] = []
        for place, answer in enumerate(made):
            if answer:
                prompt, chosen = prompt_and_answer(self.dataset, rows[place])
                whole = [*prompt, *answer, chosen[-1]]
                ids.append(np.array(whole, dtype=np.int64))
                responses.append(np.arange(len(whole)) >= len(prompt))
            else:
                real = rejected.attention_mask_BT[place]
                ids.append(rejected.input_ids_BT[place][real].numpy())
                responses.append(rejected.response_mask_BT[place][real].numpy())
        texts, marks = pad_texts(ids, self.dataset.pad_id), pad_texts(responses, 0)
        response_BT = marks.input_ids_BT.bool()
        return replace(batch, rejected=SequenceBatch(texts.input_ids_BT, texts.attention_mask_BT, response_BT))

    def _made(self, row: int, step: int) -> list[int]:
        """An answer without its end token; empty: the data's own stays."""
        kind = None if row < 0 else kind_of(self.spec, self.seed, step, row)
        if kind is None:
            return []
        prompt, (*chosen, _end) = prompt_and_answer(self.dataset, row)
        chance = random.Random(f"{self.seed}\n{step}\n{row}\n{kind}")
        match kind:
            case "random_tokens":
                made = [chance.choice(self.ordinary) for _ in chosen]
            case "first_halves":
                made = chosen[: len(chosen) // 2]
            case "other_answers":
                made = prompt_and_answer(self.dataset, chance.randrange(len(self.dataset)))[1][:-1]
            case _:
                made = self.samples.get(row, [])
        return made if made != chosen and len(prompt) + len(made) < self.longest else []


def kind_of(spec: Negatives, seed: int, step: int, row: int) -> str | None:
    """Which answer a row is compared with in a step; None: the one that the data rejects."""
    drawn = random.Random(f"{seed}\n{step}\n{row}").random()
    for kind, share in spec.shares().items():
        drawn -= share
        if drawn < 0:
            return kind
    return None


def prompt_and_answer(dataset: Dataset, row: int) -> tuple[list[int], list[int]]:
    """The tokens of a row's prompt and of its chosen answer, the end token included."""
    ids, response = dataset.cut("chosen_ids", row), dataset.cut("chosen_response", row)
    return ids[~response].tolist(), ids[response].tolist()


def sampled_rows(spec: Negatives, plan: BatchPlan, seed: int, steps: int) -> list[int]:
    """The rows that are compared in some step with what the stage's start writes."""
    if not spec.samples:
        return []
    rows = {row for step in range(steps) for row in plan.sample_ids(step) if kind_of(spec, seed, step, row) == SAMPLES}
    return sorted(rows)


@torch.no_grad()
def written_by(
    model: nn.Module,
    rows: Sequence[int],
    dataset: Dataset,
    tokenization: Tokenization,
    spec: Negatives,
    seed: int,
    watch: Watch,
) -> dict[int, list[int]]:
    """What a model answers to the prompts of these rows, without the end token, each rank its share; collective."""
    own = rows[distributed.rank() :: distributed.world_size()]
    found: list[tuple[int, list[int]]] = []
    if own:
        prompts = [np.array(prompt_and_answer(dataset, row)[0], dtype=np.int64) for row in own]
        texts = pad_texts(prompts, dataset.pad_id, left=True)
        batch = PromptBatch(texts.input_ids_BT, texts.attention_mask_BT, torch.tensor(own))
        settings = sampling_settings(tokenization, spec.max_new_tokens)
        uniforms_BR = response_uniforms(seed, "negatives", 0, [(row, 0) for row in own], spec.max_new_tokens)
        device = next(model.parameters()).device
        drawn = generate_in_parts(model, batch.to(device), settings, uniforms_BR, GENERATION_BATCH, watch)
        for row, tokens, mask, ended in zip(
            own, drawn.tokens_BR, drawn.response_mask_BR, drawn.ended_B.tolist(), strict=True
        ):
            answer = tokens[mask].tolist()
            found.append((row, answer[:-1] if ended else answer))
    return {row: answer for part in distributed.gather_json(found) for row, answer in part}
