"""What one PPO iteration learns from: every rank's responses with what the models say of them, and its mini-batches.

Shapes: B a rank's or a micro-batch's samples, N samples of all ranks, P prompt tokens, R response tokens,
T tokens of both together (padding stands on the right: causal attention needs no mask).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from rlhf.algorithms.advantages import Credit
from trainers.data.batches import SequenceBatch, TokenBatch
from trainers.runtime.distributed import gather_json, sum_tensor, world_size


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


@dataclass(frozen=True)
class Judged:
    """What the models say of the responses before the update; zero outside of the response."""

    logprobs_BR: Tensor
    """Of the policy that sampled, by the training forward at the sampling temperature, in the first update's
    micro-batches."""
    reference_logprobs_BR: Tensor
    entropy_BR: Tensor
    values_BR: Tensor | None
    """Of the critic; None where there is none."""
    scores_B: Tensor
    """As the reward model gave them."""


@dataclass(frozen=True)
class PpoBatch:
    """A micro-batch of experience, padded to its own widths."""

    responses: Responses
    old_logprobs_BR: Tensor
    reference_logprobs_BR: Tensor
    old_values_BR: Tensor | None
    advantages_BR: Tensor
    returns_BR: Tensor | None
    kl_coef: float
    """Weight of the KL term in the loss; 0 where the penalty is in the reward."""
    actor_learns: bool
    """False while only the critic warms up."""
    is_untouched: bool
    """True where the policy is still exactly the one that sampled, so that every ratio is 1."""
    text: TokenBatch | None = None
    """Text whose loss is mixed in; a step's first micro-batch of every rank brings it."""
    text_scale: float = 0.0
    """Weight of the text's loss sum: its coefficient, times the step's response tokens over its target tokens."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Rows of the prompts."""
        return self.responses.sample_ids_B

    def to(self, device: torch.device | str) -> "PpoBatch":
        """The batch itself: experience is made where it is used."""
        return self

    @property
    def weight(self) -> float:
        """Response tokens."""
        return float(self.responses.response_mask_BT.sum())


@dataclass(frozen=True)
class Experience:
    """One iteration's samples of all ranks, equal on every rank, in the order of their global positions."""

    responses: Responses
    judged: Judged
    credit: Credit

    def batch(self, rows: Sequence[int], *, kl_coef: float, actor_learns: bool, is_untouched: bool) -> PpoBatch:
        """These rows as a micro-batch."""
        responses = self.responses.rows(rows)
        width = int(responses.response_mask_BT.sum(dim=1).max())
        credit, values_NR = self.credit, self.judged.values_BR
        index = torch.as_tensor(rows, device=credit.advantages_NR.device)
        return PpoBatch(
            responses=responses,
            old_logprobs_BR=self.judged.logprobs_BR[index, :width],
            reference_logprobs_BR=self.judged.reference_logprobs_BR[index, :width],
            old_values_BR=None if values_NR is None else values_NR[index, :width],
            advantages_BR=credit.advantages_NR[index, :width],
            returns_BR=None if credit.returns_NR is None else credit.returns_NR[index, :width],
            kl_coef=kl_coef,
            actor_learns=actor_learns,
            is_untouched=is_untouched,
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


def join_tables(*tables: Tensor) -> tuple[Tensor, ...]:
    """Complete tables over every rank's samples, of which a rank filled its own rows alone, the rest 0; collective."""
    return tuple(sum_tensor(table) for table in tables)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate every rank's rows, equally many of each; booleans travel as bytes; collective."""
    if world_size() == 1:
        return tensor
    sent = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()
    received = [torch.empty_like(sent) for _ in range(world_size())]
    torch.distributed.all_gather(received, sent)
    return torch.cat(received).to(tensor.dtype)
