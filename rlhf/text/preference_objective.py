"""What a policy learns from judged answers: its log-probabilities of them, the reference's, and the loss of both.

Shapes: B rows, T tokens of prompt and answer, N predicted tokens of all answers.
"""

from dataclasses import dataclass
from functools import partial
from typing import assert_never

import torch
from torch import Tensor, nn

from recipes.stages.preference_losses import Dpo, Hinge, Ipo, Orpo, PreferenceLoss, Robust, Simpo
from rlhf.algorithms.logprobs import chosen_logprobs
from rlhf.algorithms.preferences import (
    hinge_loss,
    logistic_loss,
    orpo_loss,
    robust_loss,
    simpo_loss,
    squared_loss,
)
from rlhf.text.policy import backbone_states
from trainers.data.batches import PairBatch, SequenceBatch
from trainers.models.forward_forms import head_logits
from trainers.objectives.protocol import ObjectiveOutput


class AnswerLogprobs(nn.Module):
    """A causal language model that gives the log-probability of each row's answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sequences: SequenceBatch) -> Tensor:
        """Sum over the answer's tokens [B], in fp32; a first token of all has no state in which it was chosen."""
        predicted_BT = sequences.response_mask_BT[:, 1:]
        states_ND = backbone_states(self.network, sequences.input_ids_BT)[:, :-1][predicted_BT]
        tokens_N = sequences.input_ids_BT[:, 1:][predicted_BT]
        logprobs_N, _ = chosen_logprobs(partial(head_logits, self.network), states_ND, tokens_N, 1.0, False)
        logprobs_BT = torch.zeros_like(predicted_BT, dtype=logprobs_N.dtype)
        return logprobs_BT.masked_scatter(predicted_BT, logprobs_N).sum(dim=1)


@dataclass(frozen=True)
class ReferredPairs:
    """Pairs with what the reference says of them."""

    pairs: PairBatch
    reference_B2: Tensor
    """Log-probabilities of the chosen and the rejected answer."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Rows of the data set."""
        return self.pairs.sample_ids_B

    def to(self, device: torch.device | str) -> "ReferredPairs":
        """Copy to a device."""
        return ReferredPairs(self.pairs.to(device), self.reference_B2.to(device))


@dataclass(frozen=True)
class Sides:
    """What is known of real pairs: a column for the chosen answers, one for the rejected ones."""

    logprobs_B2: Tensor
    reference_B2: Tensor
    lengths_B2: Tensor
    """Predicted tokens; at least 1."""

    @property
    def means_B2(self) -> Tensor:
        """Mean token log-probabilities."""
        return self.logprobs_B2 / self.lengths_B2

    def log_ratios_B2(self, length_normalised: bool) -> Tensor:
        """Log-ratios to the reference: sums over an answer's tokens, or means."""
        ratios_B2 = self.logprobs_B2 - self.reference_B2
        return ratios_B2 / self.lengths_B2 if length_normalised else ratios_B2


@dataclass(frozen=True)
class Judged:
    """What a loss makes of pairs: the loss of each, and the rewards that the policy implies."""

    losses_B: Tensor
    rewards_B2: Tensor


def judge(loss: PreferenceLoss, sides: Sides) -> Judged:
    """Apply a recipe's loss to pairs."""
    match loss:
        case Orpo():
            chosen_B, rejected_B = sides.means_B2.unbind(dim=1)
            return Judged(orpo_loss(chosen_B, rejected_B, loss.odds_weight), loss.odds_weight * sides.means_B2)
        case Simpo():
            chosen_B, rejected_B = sides.means_B2.unbind(dim=1)
            return Judged(simpo_loss(chosen_B, rejected_B, loss.beta, loss.gamma), loss.beta * sides.means_B2)
        case _:
            ratios_B2 = sides.log_ratios_B2(loss.length_normalised)
            return Judged(_margin_loss(loss, ratios_B2[:, 0] - ratios_B2[:, 1]), loss.beta * ratios_B2)


def _margin_loss(loss: Dpo | Ipo | Hinge | Robust, margin_B: Tensor) -> Tensor:
    match loss:
        case Dpo():
            return logistic_loss(margin_B, loss.beta, loss.label_smoothing)
        case Ipo():
            return squared_loss(margin_B, loss.beta)
        case Hinge():
            return hinge_loss(margin_B, loss.beta)
        case Robust():
            return robust_loss(margin_B, loss.beta, loss.label_smoothing)
        case _:
            assert_never(loss)


class PreferenceObjective:
    """The mean of a loss over the global batch's pairs; the module is `AnswerLogprobs`, wrapped by an engine or not."""

    def __init__(self, loss: PreferenceLoss) -> None:
        self._loss = loss

    def weight(self, batch: ReferredPairs) -> float:
        """Pairs, fillers left out."""
        return float((batch.sample_ids_B >= 0).sum())

    def loss(self, module: nn.Module, batch: ReferredPairs) -> ObjectiveOutput:
        """Read both sides in one forward and sum the loss over real pairs."""
        real_B, pairs = batch.sample_ids_B >= 0, batch.pairs
        sides = Sides(pair_logprobs(module, pairs)[real_B], batch.reference_B2[real_B], answer_lengths(pairs)[real_B])
        found = judge(self._loss, sides)
        count = float(real_B.sum())
        with torch.no_grad():
            ((chosen_B, rejected_B), (chosen_logprob_B, rejected_logprob_B)) = (
                table.unbind(dim=1) for table in (found.rewards_B2, sides.logprobs_B2)
            )
            hits_B = (chosen_B > rejected_B) + 0.5 * (chosen_B == rejected_B)
            named = {
                "loss": found.losses_B, "accuracy": hits_B, "margin": chosen_B - rejected_B,
                "chosen_reward": chosen_B, "rejected_reward": rejected_B,
                "chosen_logprob": chosen_logprob_B, "rejected_logprob": rejected_logprob_B,
            }  # fmt: skip
            metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
                name: (values_B.sum(), count) for name, values_B in named.items()
            }
        return ObjectiveOutput(found.losses_B.sum(), metrics)


def pair_logprobs(module: nn.Module, pairs: PairBatch) -> Tensor:
    """Log-probabilities [B, 2] of the chosen and the rejected answers."""
    chosen_B, rejected_B = module(pairs.joined()).chunk(2)
    return torch.stack([chosen_B, rejected_B], dim=1)


def answer_lengths(pairs: PairBatch) -> Tensor:
    """Predicted tokens [B, 2] of the chosen and the rejected answers, at least 1."""
    sides = (pairs.chosen, pairs.rejected)
    return torch.stack([side.response_mask_BT[:, 1:].sum(dim=1).clamp(min=1) for side in sides], dim=1)
