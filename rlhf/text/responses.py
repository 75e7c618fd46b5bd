"""Responses as gapless rows: joined from prompts and what was sampled, gathered over ranks, keyed by their draw.

Shapes: B a rank's or a micro-batch's samples, P prompt tokens, R response tokens, T tokens of both together (padding
stands on the right: causal attention needs no mask).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.experience import gather_rows
from trainers.data.batches import PromptBatch, SequenceBatch
from trainers.inference.rollouts import SampleKey
from trainers.runtime.distributed import gather_json, world_size


@dataclass(frozen=True)
class Responses:
    """Prompts and what was written to them."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """True at real tokens."""
    response_mask_BT: Tensor
    """True at the response's tokens, the end token included."""
    ended_B: Tensor
    """True where an end token came before the limit."""
    sample_ids_B: Tensor
    """Row of the prompt in its data set."""

    @property
    def response_mask_BR(self) -> Tensor:
        """True at response tokens, counted from each response's own start."""
        return widths_mask(self.response_mask_BT.sum(dim=1))

    @property
    def action_mask_BA(self) -> Tensor:
        """The same: tokens of a response are actions."""
        return self.response_mask_BR

    @property
    def response_ids(self) -> list[list[int]]:
        """The response tokens of each row."""
        return [ids[mask].tolist() for ids, mask in zip(self.input_ids_BT, self.response_mask_BT, strict=True)]

    def closed(self, end_ids: Sequence[int]) -> SequenceBatch:
        """The rows as a reward model reads them: a response without one of the end tokens at its end gets the first.

        Reward models learn from whole turns, so a score read anywhere but at an end token would mean nothing: not
        where the limit cut a response off, and not at a stop token that ends no turn.
        """
        lengths_B = self.attention_mask_BT.sum(dim=1)
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        ends = torch.tensor(end_ids, dtype=torch.int64, device=lengths_B.device)
        is_open_B = ~torch.isin(self.input_ids_BT[rows_B, lengths_B - 1], ends)
        rows_B, places_B = rows_B[is_open_B], lengths_B[is_open_B]
        pad = torch.nn.functional.pad
        ids, real, response = (
            pad(t, (0, 1)) for t in (self.input_ids_BT, self.attention_mask_BT, self.response_mask_BT)
        )
        ids[rows_B, places_B] = end_ids[0]
        real[rows_B, places_B] = True
        response[rows_B, places_B] = True
        width = int(real.sum(dim=1).max())
        return SequenceBatch(ids[:, :width], real[:, :width], response[:, :width])

    def to(self, device: torch.device | str) -> "Responses":
        """The same on a device."""
        return Responses(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def rows(self, index: Sequence[int]) -> "Responses":
        """These rows, without the columns that are padding in all of them."""
        chosen = torch.as_tensor(index, device=self.input_ids_BT.device)
        mask = self.attention_mask_BT[chosen]
        width = int(mask.sum(dim=1).max())
        return Responses(
            input_ids_BT=self.input_ids_BT[chosen, :width],
            attention_mask_BT=mask[:, :width],
            response_mask_BT=self.response_mask_BT[chosen, :width],
            ended_B=self.ended_B[chosen],
            sample_ids_B=self.sample_ids_B[chosen],
        )


def widths_mask(widths_B: Tensor) -> Tensor:
    """[B, R]: True at the first `widths_B` places of each row, R the largest of them."""
    places_R = torch.arange(int(widths_B.max()), device=widths_B.device)
    return places_R[None, :] < widths_B[:, None]


def join_responses(
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    tokens_BR: Tensor,
    response_mask_BR: Tensor,
    ended_B: Tensor,
    sample_ids_B: Tensor,
) -> Responses:
    """Prompt and response as one row without gaps, padded on the right."""
    mask = torch.cat([prompt_mask_BP, response_mask_BR], dim=1)
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices
    is_response = torch.cat([torch.zeros_like(prompt_mask_BP), response_mask_BR], dim=1)
    width = int(mask.sum(dim=1).max())
    return Responses(
        input_ids_BT=torch.cat([prompt_ids_BP, tokens_BR], dim=1).gather(1, order)[:, :width],
        attention_mask_BT=mask.gather(1, order)[:, :width],
        response_mask_BT=is_response.gather(1, order)[:, :width],
        ended_B=ended_B,
        sample_ids_B=sample_ids_B,
    )


def gather_responses(responses: Responses) -> Responses:
    """Every rank's responses in rank order, padded to a common width; collective. All ranks hold equally many."""
    if world_size() == 1:
        return responses
    tokens = max(gather_json(responses.input_ids_BT.shape[1]))
    return Responses(
        input_ids_BT=gather_rows(_widened(responses.input_ids_BT, tokens)),
        attention_mask_BT=gather_rows(_widened(responses.attention_mask_BT, tokens)),
        response_mask_BT=gather_rows(_widened(responses.response_mask_BT, tokens)),
        ended_B=gather_rows(responses.ended_B),
        sample_ids_B=gather_rows(responses.sample_ids_B),
    )


def _widened(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


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


def responses_of(prompts: PromptBatch, tokens_BR: Tensor, response_mask_BR: Tensor, ended_B: Tensor) -> Responses:
    """What was sampled to these prompts."""
    return join_responses(
        prompts.input_ids_BP, prompts.attention_mask_BP, tokens_BR, response_mask_BR, ended_B, prompts.sample_ids_B
    )
