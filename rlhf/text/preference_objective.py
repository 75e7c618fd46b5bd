"""What a policy learns from judged answers: its log-probabilities of them, the reference's, and the loss of both.

Shapes: B rows, T tokens of prompt and answer, N predicted tokens of all answers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor, nn

from recipes.stages.preference_losses import Dpo, Hinge, Ipo, Kto, Orpo, PreferenceLoss, Robust, Simpo
from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.preferences import (
    hinge_loss,
    kto_loss,
    logistic_loss,
    orpo_loss,
    robust_loss,
    simpo_loss,
    squared_loss,
)
from rlhf.text.policy import backbone_states
from trainers.data.batches import JudgedBatch, PairBatch, SequenceBatch
from trainers.engine.protocol import Engine
from trainers.models.forward_forms import head_logits
from trainers.objectives.protocol import ObjectiveOutput
from trainers.runtime import distributed


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
        logprobs_N = token_logprobs(head_logits(self.network, states_ND), tokens_N)
        logprobs_BT = torch.zeros_like(predicted_BT, dtype=logprobs_N.dtype)
        return logprobs_BT.masked_scatter(predicted_BT, logprobs_N).sum(dim=1)


@dataclass(frozen=True)
class Referred:
    """Judged answers with what the reference says of them."""

    rows: PairBatch | JudgedBatch
    reference_B2: Tensor
    """Log-probabilities of the chosen and the rejected answer, or of the answer and the mismatched one."""
    kl: float = 0.0
    """Of single answers: how far the policy is from the reference, over the whole step."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Rows of the data set."""
        return self.rows.sample_ids_B

    @property
    def is_real_B(self) -> Tensor:
        """False at fillers."""
        return self.sample_ids_B >= 0

    def to(self, device: torch.device | str) -> "Referred":
        """Copy to a device."""
        return replace(self, rows=self.rows.to(device), reference_B2=self.reference_B2.to(device))


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


def judge(loss: Dpo | Ipo | Hinge | Robust | Orpo | Simpo, sides: Sides) -> Judged:
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
    """The mean of a loss over the global batch's pairs, or answers; the module is `AnswerLogprobs`, wrapped or not."""

    def __init__(self, loss: PreferenceLoss) -> None:
        self._loss = loss

    def weight(self, batch: Referred) -> float:
        """Rows, fillers left out."""
        return float(batch.is_real_B.sum())

    def loss(self, module: nn.Module, batch: Referred) -> ObjectiveOutput:
        """Sum the loss over real rows; both sides of pairs are read in one forward."""
        if isinstance(self._loss, Kto):
            return _single_answers(module, batch, self._loss)
        assert isinstance(batch.rows, PairBatch)
        real_B, pairs = batch.is_real_B, batch.rows
        logprobs_B2 = answer_logprobs(module, pairs)
        sides = Sides(logprobs_B2[real_B], batch.reference_B2[real_B], answer_lengths(pairs)[real_B])
        found = judge(self._loss, sides)
        with torch.no_grad():
            ((chosen_B, rejected_B), (chosen_logprob_B, rejected_logprob_B)) = (
                table.unbind(dim=1) for table in (found.rewards_B2, sides.logprobs_B2)
            )
            named = {
                "loss": found.losses_B, "accuracy": _hits(chosen_B - rejected_B), "margin": chosen_B - rejected_B,
                "chosen_reward": chosen_B, "rejected_reward": rejected_B,
                "chosen_logprob": chosen_logprob_B, "rejected_logprob": rejected_logprob_B,
            }  # fmt: skip
        return ObjectiveOutput(found.losses_B.sum(), {name: _summed(values_B) for name, values_B in named.items()})


def _single_answers(module: nn.Module, batch: Referred, loss: Kto) -> ObjectiveOutput:
    """Sum the loss over real answers; those with a good verdict are reported as chosen, the others as rejected."""
    assert isinstance(batch.rows, JudgedBatch)
    real_B = batch.is_real_B
    good_B, logprobs_B = batch.rows.is_desirable_B[real_B], module(batch.rows.answers)[real_B]
    ratios_B = logprobs_B - batch.reference_B2[real_B, 0]
    losses_B = kto_loss(ratios_B, good_B, batch.kl, loss.beta, (loss.desirable_weight, loss.undesirable_weight))
    with torch.no_grad():
        named = {
            "loss": losses_B, "kl": torch.full_like(ratios_B, batch.kl),
            "chosen_reward": loss.beta * ratios_B[good_B], "rejected_reward": loss.beta * ratios_B[~good_B],
            "chosen_logprob": logprobs_B[good_B], "rejected_logprob": logprobs_B[~good_B],
        }  # fmt: skip
    return ObjectiveOutput(losses_B.sum(), {name: _summed(values_B) for name, values_B in named.items()})


def _summed(values_B: Tensor) -> tuple[Tensor | float, Tensor | float]:
    return values_B.detach().sum(), float(len(values_B))


def _hits(leads_B: Tensor) -> Tensor:
    """1 where what should lead does, half where nothing leads."""
    return (leads_B > 0) + 0.5 * (leads_B == 0)


def answer_logprobs(module: nn.Module, rows: PairBatch | JudgedBatch) -> Tensor:
    """Log-probabilities [B, 2] of the chosen and the rejected answers, or of the answers and the mismatched ones."""
    first_B, second_B = module(rows.joined()).chunk(2)
    return torch.stack([first_B, second_B], dim=1)


def answer_lengths(pairs: PairBatch) -> Tensor:
    """Predicted tokens [B, 2] of the chosen and the rejected answers, at least 1."""
    sides = (pairs.chosen, pairs.rejected)
    return torch.stack([side.response_mask_BT[:, 1:].sum(dim=1).clamp(min=1) for side in sides], dim=1)


@torch.no_grad()
def ranking(engine: Engine, batches: Iterable[Referred]) -> float | None:
    """Share of all pairs of a desirable and an undesirable answer of all ranks' batches, ties half, in which the
    desirable one has the larger log-ratio; None: there is no such pair. Collective.
    """
    engine.module.eval()
    own: list[tuple[float, bool]] = []
    for batch in batches:
        assert isinstance(batch.rows, JudgedBatch)
        ratios_B = engine.module(batch.rows.answers.to(engine.device)).cpu() - batch.reference_B2[:, 0]
        real_B = batch.is_real_B
        own += zip(ratios_B[real_B].tolist(), batch.rows.is_desirable_B[real_B].tolist(), strict=True)
    engine.module.train()
    found = [item for part in distributed.gather_json(own) for item in part]
    good, bad = (torch.tensor([ratio for ratio, is_good in found if is_good == wanted]) for wanted in (True, False))
    return float(_hits(good[:, None] - bad[None]).mean()) if len(good) and len(bad) else None


@torch.no_grad()
def with_kl(engine: Engine, batches: Sequence[Referred]) -> list[Referred]:
    """Give all ranks' batches of a step the policy's distance to the reference, in nats an answer; collective.

    The mean log-ratio of answers to other prompts, and 0 where that is less (Ethayarajh et al. 2024, section 4.1).
    """
    engine.module.eval()
    total, count = 0.0, 0.0
    for batch in batches:
        assert isinstance(batch.rows, JudgedBatch)
        ratios_B = engine.module(batch.rows.mismatched.to(engine.device)).cpu() - batch.reference_B2[:, 1]
        total += float(ratios_B[batch.is_real_B].double().sum())
        count += float(batch.is_real_B.sum())
    engine.module.train()
    total, count = distributed.all_sum([total, count])
    return [replace(batch, kl=max(0.0, total / count)) for batch in batches]
