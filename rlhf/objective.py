"""The loss of a micro-batch of experience: an algorithm's surrogate, and what is added to it.

Shapes: B samples, A actions.
"""

from typing import Any

from torch import Tensor, nn

from rlhf.algorithm import Algorithm
from rlhf.algorithms.kl import k1
from rlhf.algorithms.losses import policy_loss
from rlhf.experience import RlBatch
from rlhf.invariants import require_ratio_one
from rlhf.policy import ModelOutputs, Policy, rounding_scales
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import ObjectiveOutput

Sums = dict[str, tuple[Tensor | float, Tensor | float]]


class RlObjective:
    """The policy's surrogate, entropy bonus, optional KL term and text; with a critic its value loss too."""

    def __init__(self, policy: Policy[Any], algorithm: Algorithm, roundoff: float) -> None:
        self._policy = policy
        self._algorithm = algorithm
        self._roundoff = roundoff

    def weight(self, batch: RlBatch[Any]) -> float:
        """Actions: the loss is their weighted mean over the whole optimiser step."""
        return batch.weight

    def loss(self, module: nn.Module, batch: RlBatch[Any]) -> ObjectiveOutput:
        """One forward of the actor, and of the critic where there is one, over the samples."""
        algorithm, mask_BA, actions = self._algorithm, batch.action_mask_BA, batch.weight
        outputs = ModelOutputs(**self._policy.learn(module, batch))
        logprobs_BA = outputs.logprobs_BA
        assert logprobs_BA is not None
        old_BA = logprobs_BA.detach() if batch.old_logprobs_BA is None else batch.old_logprobs_BA
        ratios_BA = algorithm.log_ratios(logprobs_BA, old_BA, mask_BA)
        surrogate = algorithm.surrogate(ratios_BA, batch.advantages_BA)
        policy = policy_loss(surrogate, ratios_BA, mask_BA, batch.weights_BA)
        if batch.is_untouched:
            self._require_ratio_one(logprobs_BA, old_BA, mask_BA, outputs.distances_BA)
        actor, metrics = self._further_terms(policy.loss, logprobs_BA, old_BA, outputs, batch)
        largest = {"log_ratio_max": policy.max_log_ratio}
        if batch.old_logprobs_BA is None:
            measured, gaps = first_measures(old_BA, outputs.entropy_BA, batch)
            metrics, largest = metrics | measured, largest | gaps
        loss = actor * float(batch.actor_learns)
        if batch.returns_BA is not None:
            assert algorithm.value_loss is not None
            assert outputs.values_BA is not None
            assert batch.old_values_BA is not None
            value = algorithm.value_loss(outputs.values_BA, batch.old_values_BA, batch.returns_BA, mask_BA)
            loss = loss + algorithm.value_coef * value.loss
            metrics |= {
                "value_loss": (value.loss.detach(), actions),
                "value_error": (value.squared_error, actions),
                "value_clip_fraction": (value.clipped, actions),
            }
        metrics |= {
            "loss": (loss.detach(), actions),
            "policy_loss": (policy.loss.detach(), actions),
            "ratio": (policy.ratio, actions),
            "log_ratio": (policy.log_ratio, actions),
            "clip_fraction": (policy.clipped, actions),
            "old_kl": (policy.old_kl, actions),
        }
        return ObjectiveOutput(loss.float(), metrics, largest)

    def _further_terms(
        self, actor: Tensor, logprobs_BA: Tensor, old_BA: Tensor, outputs: ModelOutputs, batch: RlBatch[Any]
    ) -> tuple[Tensor, Sums]:
        """The actor's loss with entropy bonus, penalty and text, and the metrics of these."""
        metrics: Sums = {}
        if self._algorithm.entropy_coef > 0:
            assert outputs.entropy_BA is not None
            actor = actor - self._algorithm.entropy_coef * (outputs.entropy_BA * batch.weights_BA).sum()
        if batch.kl_coef > 0:
            penalty_BA = outputs.kl_BA
            if penalty_BA is None:
                assert batch.reference_logprobs_BA is not None
                penalty_BA = self._algorithm.kl_penalty(logprobs_BA, old_BA, batch.reference_logprobs_BA)
            actor = actor + batch.kl_coef * (penalty_BA * batch.weights_BA).sum()
        if batch.text is not None and outputs.text_loss is not None:
            actor = actor + batch.text.scale * outputs.text_loss
            metrics["text_loss"] = (outputs.text_loss.detach(), LanguageModelObjective().weight(batch.text.batch))
        return actor, metrics

    def _require_ratio_one(
        self, logprobs_BA: Tensor, old_BA: Tensor, mask_BA: Tensor, distances_BA: Tensor | None
    ) -> None:
        """Stop the stage if the policy gives its own samples another probability before the first update on them."""
        scales_BA = rounding_scales(old_BA, distances_BA, self._roundoff)
        require_ratio_one((logprobs_BA - old_BA)[mask_BA], scales_BA[mask_BA], self._roundoff)


def first_measures(
    logprobs_BA: Tensor, entropy_BA: Tensor | None, batch: RlBatch[Any]
) -> tuple[Sums, dict[str, Tensor]]:
    """What a report says of a policy that was asked before the update, by the same names: sums, and the largest."""
    mask_BA, measured, largest = batch.action_mask_BA, dict[str, Any](), {}
    if entropy_BA is not None:
        measured["entropy"] = (entropy_BA.detach().double().sum(), batch.weight)
    if batch.reference_logprobs_BA is not None:
        log_ratios_BA = k1(logprobs_BA, batch.reference_logprobs_BA)
        measured["kl"] = (log_ratios_BA[mask_BA].double().sum(), float(len(mask_BA)))
    if batch.sampled_logprobs_BA is not None:
        gaps_N = (logprobs_BA - batch.sampled_logprobs_BA)[mask_BA].abs().double()
        measured["sampler_gap"], largest["sampler_gap_max"] = (gaps_N.sum(), batch.weight), gaps_N.max()
    return measured, largest
