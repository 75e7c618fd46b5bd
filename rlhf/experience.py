"""What an iteration learns from: samples of all ranks, what the models say of them, and the credit of each action.

Shapes: B a micro-batch's samples, N samples of all ranks, A actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

import torch
import torch.distributed
from torch import Tensor

from recipes.stages.updates import AdaptiveKl, Updates
from rlhf.algorithm import Algorithm
from rlhf.algorithms.advantages import Credit, Rewarded
from rlhf.algorithms.aggregation import Weights
from rlhf.invariants import require_reference, require_version
from rlhf.monitors import Report, kept_iterations
from rlhf.policy import Learner, ModelOutputs, Policy, Rollouts, S, ScoredRollouts, TextShare, Wanted, rounding_scales
from trainers.runtime.distributed import sum_tensor, world_size
from trainers.runtime.observer import agreed, raise_if_stopping, watching

ALL = Wanted()


@dataclass(frozen=True)
class Update:
    """Which optimiser step a mini-batch is for."""

    step: int
    iteration: int
    kl_coef: float
    """Weight of the KL term in the loss; 0 where the penalty is in the reward."""
    is_untouched: bool
    """Whether the policy is still exactly the one that sampled, so that every ratio is 1."""


@dataclass(frozen=True)
class RlBatch(Generic[S]):
    """A micro-batch of experience, padded to its own widths."""

    samples: S
    action_mask_BA: Tensor
    weights_BA: Tensor
    """What each action counts in the step's mean, 1 on average; 0 where the policy did not act or a filter acts."""
    old_logprobs_BA: Tensor | None
    """None: the policy was not asked before; what it says now is what it said when it sampled."""
    reference_logprobs_BA: Tensor | None
    """None: the reference was not asked."""
    old_values_BA: Tensor | None
    advantages_BA: Tensor
    returns_BA: Tensor | None
    kl_coef: float
    """Weight of the KL term in the loss; 0 where the penalty is in the reward."""
    actor_learns: bool
    """False while only the critic warms up."""
    is_untouched: bool
    """True where the policy is still exactly the one that sampled, so that every ratio is 1."""
    text: TextShare | None = None
    """Text whose loss is mixed in; a step's first micro-batch of every rank brings it."""
    sampled_logprobs_BA: Tensor | None = None
    """As the sampler saw them."""

    @property
    def sample_ids_B(self) -> Tensor:
        """What the samples are known by in messages."""
        return self.samples.sample_ids_B

    def to(self, device: torch.device | str) -> "RlBatch[S]":
        """The batch itself: experience is made where it is used."""
        return self

    @property
    def weight(self) -> float:
        """Actions."""
        return float(self.action_mask_BA.sum())


@dataclass(frozen=True)
class Experience(Generic[S]):
    """One iteration's samples of all ranks, equal on every rank, in the order of their global positions."""

    samples: S
    scored: ScoredRollouts
    credit: Credit
    weights: Weights
    sampled_logprobs_NA: Tensor | None = None

    def batch(
        self,
        rows: Sequence[int],
        *,
        weight_scale: float,
        kl_coef: float,
        actor_learns: bool,
        is_untouched: bool,
        text: TextShare | None = None,
    ) -> RlBatch[S]:
        """These rows as a micro-batch; `weight_scale` is that of its mini-batch."""
        samples = self.samples.rows(rows)
        mask_BA = samples.action_mask_BA
        index, width = torch.as_tensor(rows, device=mask_BA.device), mask_BA.shape[1]
        scored, credit = self.scored, self.credit
        old_NA = scored.logprobs_NA
        if old_NA is None and not is_untouched:
            old_NA = scored.later_logprobs_NA

        def narrowed(table_NA: Tensor | None) -> Tensor | None:
            return None if table_NA is None else table_NA[index, :width]

        return RlBatch(
            samples=samples,
            action_mask_BA=mask_BA,
            weights_BA=self.weights.actions_NA[index, :width] * weight_scale,
            old_logprobs_BA=narrowed(old_NA),
            reference_logprobs_BA=narrowed(scored.reference_logprobs_NA),
            old_values_BA=narrowed(scored.values_NA),
            advantages_BA=credit.advantages_NA[index, :width],
            returns_BA=narrowed(credit.returns_NA),
            kl_coef=kl_coef,
            actor_learns=actor_learns,
            is_untouched=is_untouched,
            text=text,
            sampled_logprobs_BA=narrowed(self.sampled_logprobs_NA),
        )


@dataclass(frozen=True)
class Estimate(Generic[S]):
    """What an iteration learns from, equal on every rank."""

    experience: Experience[S]
    """Every rank's samples with their advantages."""
    report: Report
    filtered: Mapping[str, float] = field(default_factory=dict)
    """Shares of the samples that the update leaves out, by their names in the run's metrics."""


@dataclass
class ExperienceMaker(Generic[S]):
    """Samples from a policy, has the samples judged, and assigns credit by the algorithm."""

    policy: Policy[S]
    algorithm: Algorithm
    settings: Updates
    learner: Learner

    def estimate(self, iteration: int, kl_coef: float, first_epoch: Sequence[Sequence[int]]) -> Estimate[S]:
        """Sample, score, penalise with `kl_coef`, estimate advantages: the upper half of PPO's algorithm box.

        `first_epoch` are the rows of the mini-batches that are learnt from first. Samples are judged in their
        micro-batches: the first update then runs the very forward that gave the old log-probabilities. Collective.
        """
        policy, learner = self.policy, self.learner
        version, place = policy.sync(iteration), iteration_place(self.settings, iteration)
        own = agreed(learner.observer, lambda: self._drawn(iteration, place))
        require_version(own.version, version)
        rollouts = policy.gathered(own)
        samples = rollouts.samples
        wanted, mask_NA = self._wanted(iteration), samples.action_mask_BA
        scored = ScoredRollouts.of(self.judged(samples, first_epoch, place, wanted), mask_NA, wanted)
        if iteration == 0:
            self._require_reference(scored, mask_NA)
        policy.show(iteration, rollouts, scored)
        scores_N = policy.scores(rollouts, scored)
        groups_N = rollouts.groups_B.to(mask_NA.device)
        ended_N = rollouts.ended_B.to(mask_NA.device)
        earlier_NA = policy.earlier_rewards(rollouts)
        rewarded = Rewarded(scores_N, scored.kl_NA, kl_coef, mask_NA, scored.values_NA, groups_N, ended_N, earlier_NA)
        credit, weights, filtered = self.algorithm.credit(rewarded), self.algorithm.aggregation(mask_NA), {}
        if (importance_NA := policy.importance(rollouts, scored)) is not None:
            weights = weights.times(importance_NA)
        for name, filtering in self.algorithm.filters.items():
            left_out_N = filtering(rewarded)
            weights, filtered[f"filtered/{name}"] = weights.without(left_out_N), float(left_out_N.double().mean())
        experience = Experience(samples, scored, credit, weights, policy.sampled_logprobs(rollouts))
        return Estimate(experience, policy.report(rollouts, scored, scores_N), filtered)

    def micro_batches(self, experience: Experience[S], rows: Sequence[int], update: Update) -> list[RlBatch[S]]:
        """This rank's share of a mini-batch; a penalty in the loss is in the advantages' unit there."""
        critic, mask_NA = self.settings.value_model, experience.samples.action_mask_BA
        num_actions = float(mask_NA[torch.as_tensor(rows, device=mask_NA.device)].sum())
        weight_scale = experience.weights.scale(rows, num_actions)
        texts = {0: self.policy.text_share(experience.samples, rows, update.step)}
        return [
            experience.batch(
                share,
                weight_scale=weight_scale,
                kl_coef=update.kl_coef / experience.credit.deviation,
                actor_learns=critic is None or update.iteration >= critic.warmup,
                is_untouched=update.is_untouched,
                text=texts.get(number),
            )
            for number, share in enumerate(self.policy.shares(experience.samples, rows))
        ]

    @torch.no_grad()
    def judged(
        self, samples: S, first_epoch: Sequence[Sequence[int]], place: Mapping[str, float], wanted: Wanted = ALL
    ) -> ModelOutputs:
        """What the models say of all samples, each judged by the rank that first learns from it; collective.

        A policy that is not wanted is asked all the same about mini-batches after the first: their update finds
        another.
        """
        policy, learner = self.policy, self.learner
        count, width = samples.action_mask_BA.shape
        tables: dict[str, Tensor] = {}
        shares = [
            (share, wanted if index == 0 else replace(wanted, policy=True, entropy=wanted.policy))
            for index, mini_batch in enumerate(first_epoch)
            for share in policy.shares(samples, mini_batch)
        ]
        for number, (rows, of_rows) in enumerate(shares):
            learner.observer.phase("judge", rows=number * count // len(shares), rows_planned=count, **place)
            raise_if_stopping(learner.observer)
            for name, found in policy.judge(learner.engine.module, samples.rows(rows), of_rows).items():
                shape = (count,) if found.dim() == 1 else (count, width)
                table = tables.setdefault(name, torch.zeros(shape, dtype=found.dtype, device=found.device))
                table[(rows, slice(found.shape[1])) if found.dim() == 2 else rows] = found
        return ModelOutputs(**{name: sum_tensor(table) for name, table in tables.items()})

    def _wanted(self, iteration: int) -> Wanted:
        """For the report alone both in a few iterations; in all others what credit, penalty and limit need.

        A policy whose samples are learnt from once need not say before its first step what that step's forward says.
        """
        settings = self.settings
        if iteration in kept_iterations(settings.iterations):
            return Wanted()
        has_limit, has_weight = settings.kl_limit is not None, settings.kl_coef > 0
        is_steered = has_weight and (settings.kl_in == "reward" or isinstance(settings.kl_controller, AdaptiveKl))
        policy = has_limit or is_steered or settings.epochs > 1 or self.policy.is_always_asked
        return Wanted(policy, reference=has_limit or has_weight)

    def _drawn(self, iteration: int, place: Mapping[str, float]) -> Rollouts[S]:
        """This rank's samples; raises Interrupted where it is asked to stop."""
        watch = watching(self.learner.observer, "rollout", self.policy.num_samples, **place)
        watch(0.0)
        return self.policy.sample(iteration, watch)

    def _require_reference(self, scored: ScoredRollouts, mask_NA: Tensor) -> None:
        """Stop the stage if actor and reference differ before anything was learnt."""
        roundoff, reference_NA = self.learner.roundoff, scored.reference_logprobs_NA
        assert reference_NA is not None
        assert scored.logprobs_NA is not None
        scales_NA = rounding_scales(reference_NA, scored.distances_NA, roundoff)
        require_reference(scored.logprobs_NA[mask_NA], reference_NA[mask_NA], scales_NA[mask_NA], roundoff)


def iteration_place(settings: Updates, iteration: int) -> dict[str, float]:
    """Where an iteration's rollouts are on the stage's way, as an observer is told it."""
    steps = settings.steps_per_iteration
    return {"step": iteration * steps, "steps_planned": settings.iterations * steps}


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate every rank's rows, equally many of each; booleans travel as bytes; collective."""
    if world_size() == 1:
        return tensor
    sent = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()
    received = [torch.empty_like(sent) for _ in range(world_size())]
    torch.distributed.all_gather(received, sent)
    return torch.cat(received).to(tensor.dtype)
