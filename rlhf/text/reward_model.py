"""Reward modelling: a scalar head on a language model's backbone, the Bradley-Terry objective, and its evaluation.

Shapes: B pairs, T tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.algorithms.losses import ranking_loss
from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.comparison import correlation, mean_and_std
from rlhf.text.policy import backbone_states, last_scores
from trainers.data.batches import PairBatch, SequenceBatch
from trainers.objectives.protocol import ObjectiveOutput
from trainers.runtime.distributed import gather_json


class ScoreModel(nn.Module):
    """A sequence classification network with one label, read at each row's last real token."""

    def __init__(self, network: nn.Module, head: str = "score") -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, sequences: SequenceBatch) -> Tensor:
        """One score per right-padded row."""
        hidden_BTD = backbone_states(self.network, sequences.input_ids_BT)
        return last_scores(hidden_BTD, sequences.attention_mask_BT, self.network.get_submodule(self.head))


class RewardObjective:
    """Mean over the global batch's pairs of -log sigmoid(chosen - rejected)."""

    def __init__(self, center_coefficient: float) -> None:
        self._center_coefficient = center_coefficient

    def weight(self, batch: PairBatch) -> float:
        """Pairs, fillers left out."""
        return float((batch.sample_ids_B >= 0).sum())

    def loss(self, module: nn.Module, batch: PairBatch) -> ObjectiveOutput:
        """Score both sides in one forward."""
        chosen_B, rejected_B = score_pairs(module, batch)
        real_B = batch.sample_ids_B >= 0
        chosen_B, rejected_B = chosen_B[real_B], rejected_B[real_B]
        loss = ranking_loss(chosen_B, rejected_B, self._center_coefficient)
        pairs = float(real_B.sum())
        with torch.no_grad():
            metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
                "loss": (loss.detach(), pairs),
                "accuracy": ((chosen_B > rejected_B).sum(), pairs),
                "margin": ((chosen_B - rejected_B).sum(), pairs),
            }
        return ObjectiveOutput(loss, metrics)


@dataclass(frozen=True)
class RewardEvaluation:
    """Held-out pairs in numbers; mean and std are over the scores of both sides."""

    loss: float
    accuracy: float
    margin: float
    length_correlation: float
    score_mean: float
    score_std: float
    pairs: int

    @property
    def statistics(self) -> ScoreStatistics:
        """What scores are normalised by."""
        return ScoreStatistics(self.score_mean, self.score_std)

    def metrics(self) -> dict[str, float]:
        """The numbers by name."""
        return {name: float(value) for name, value in vars(self).items()}


def score_pairs(module: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected side."""
    chosen_B, rejected_B = module(batch.joined()).chunk(2)
    return chosen_B, rejected_B


@torch.no_grad()
def evaluate_pairs(module: nn.Module, batches: Iterable[PairBatch], device: torch.device) -> RewardEvaluation:
    """Score this rank's held-out batches and put all ranks' pairs together, in the order of their rows; collective."""
    own: list[tuple[int, float, float, int, int]] = []
    for batch in batches:
        chosen_B, rejected_B = score_pairs(module, batch.to(device))
        rows = zip(
            batch.sample_ids_B.tolist(),
            chosen_B.tolist(),
            rejected_B.tolist(),
            batch.chosen.response_mask_BT.sum(dim=1).tolist(),
            batch.rejected.response_mask_BT.sum(dim=1).tolist(),
            strict=True,
        )
        own += [row for row in rows if row[0] >= 0]
    return summarise_pairs(sorted(tuple(row) for part in gather_json(own) for row in part))


def summarise_pairs(rows: list[tuple[int, float, float, int, int]]) -> RewardEvaluation:
    """Numbers of (row, chosen score, rejected score, chosen length, rejected length)."""
    chosen, rejected = [row[1] for row in rows], [row[2] for row in rows]
    mean, std = mean_and_std(chosen + rejected)
    loss = float(ranking_loss(torch.tensor(chosen).double(), torch.tensor(rejected).double())) / len(rows)
    return RewardEvaluation(
        loss=loss,
        accuracy=sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)) / len(rows),
        margin=(sum(chosen) - sum(rejected)) / len(rows),
        length_correlation=correlation(
            chosen + rejected, [float(row[3]) for row in rows] + [float(row[4]) for row in rows]
        ),
        score_mean=mean,
        score_std=std,
        pairs=len(rows),
    )


def failed_gates(evaluation: RewardEvaluation, min_accuracy: float) -> list[str]:
    """Why later stages should not use this reward model."""
    reasons = []
    if evaluation.accuracy < min_accuracy:
        reasons.append(f"held-out accuracy {evaluation.accuracy:.3f} is below min_accuracy {min_accuracy}")
    if not evaluation.score_std > 0:
        reasons.append("all held-out scores are equal")
    return reasons
