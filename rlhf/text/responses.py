"""Responses as gapless rows, as models read them, and the keys of their draws.

Shapes: B a rank's or a micro-batch's samples, T tokens (padding stands on the right: causal attention needs no mask), A
the most actions of a row: tokens that the policy chose.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.data.batches import PromptBatch, SequenceBatch
from trainers.inference.rollouts import SampleKey


@dataclass(frozen=True)
class Responses:
    """Prompts, what was written to them, and what an environment said in between."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """True at real tokens."""
    action_mask_BT: Tensor
    """True at the tokens that the policy chose, end tokens included: one span after the prompt, or several."""
    ended_B: Tensor
    """True where a sample came to its own end before a limit."""
    sample_ids_B: Tensor
    """Row of the prompt in its data set."""

    @property
    def action_mask_BA(self) -> Tensor:
        """True at actions, counted from each row's first one: what is said of actions has no gaps between spans."""
        return widths_mask(self.action_mask_BT.sum(dim=1))

    @property
    def action_ids(self) -> list[list[int]]:
        """The tokens of each row that the policy chose."""
        return [ids[mask].tolist() for ids, mask in zip(self.input_ids_BT, self.action_mask_BT, strict=True)]

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
        ids, real, response = (pad(t, (0, 1)) for t in (self.input_ids_BT, self.attention_mask_BT, self.action_mask_BT))
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
            action_mask_BT=self.action_mask_BT[chosen, :width],
            ended_B=self.ended_B[chosen],
            sample_ids_B=self.sample_ids_B[chosen],
        )


def widths_mask(widths_B: Tensor) -> Tensor:
    """[B, R]: True at the first `widths_B` places of each row, R the largest of them."""
    places_R = torch.arange(int(widths_B.max()), device=widths_B.device)
    return places_R[None, :] < widths_B[:, None]


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
