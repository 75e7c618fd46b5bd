"""Responses as what is sampled: prompts answered by a rollout engine, scored by a reward, learnt token by token.

Shapes: B samples, N samples of all ranks, R response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from recipes.stages.environments import TERM
from recipes.stages.rollout import Rollout
from recipes.stages.updates import TokenUpdates
from rlhf.algorithms.importance import sampler_importance
from rlhf.algorithms.logprobs import Entropy
from rlhf.algorithms.scoring import shaped_scores
from rlhf.experience import RlBatch
from rlhf.invariants import require_sampler, token_scales
from rlhf.monitors import RolloutReport, report_rollouts
from rlhf.policy import Learner, ScoredRollouts, TextShare, Wanted
from rlhf.text.episodes import Episodes
from rlhf.text.policy import PolicyModels, Role
from rlhf.text.responses import Responses, draw_keys, repeated_prompts
from rlhf.text.rewards import TextReward
from rlhf.text.samples import (
    Sample,
    collate,
    earlier_rewards,
    gather_samples,
    prompts_of,
    sampler_logprobs,
    samples_of,
)
from trainers.data.batches import BatchPlan, PromptBatch, TokenBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.mixture import Draw
from trainers.data.order import deal_by_group, deal_by_length
from trainers.inference.generation import SamplingSettings
from trainers.inference.rollouts import RolloutEngine, Sampled, SampleKey, WeightsVersion
from trainers.objectives.language_model import LanguageModelObjective
from trainers.runtime.distributed import gather_json
from trainers.runtime.observer import Interrupted, Watch, raise_if_stopping

Show = Callable[[int, Sequence[Sample], Sequence[float]], None]
"""Called with an iteration, its samples with the value of every reward term, and the weighted sums of these."""


@dataclass(frozen=True)
class TextRollouts:
    """Samples, and the batch that models read them as."""

    records: Sequence[Sample]
    """With what the terms of the reward that read texts gave."""
    samples: Responses

    @property
    def version(self) -> WeightsVersion:
        """Of the policy that drew them."""
        return self.records[0].version

    @property
    def groups_B(self) -> Tensor:
        """Rows of the prompts."""
        return self.samples.sample_ids_B

    @property
    def ended_B(self) -> Tensor:
        """Where a sample came to its own end."""
        return self.samples.ended_B


@dataclass(frozen=True)
class TextSources:
    """What a policy reads: prompts to answer, and text that is mixed into the updates."""

    prompts: BatchPlan
    text: BatchPlan | None = None


@dataclass
class TextPolicy:
    """Responses to prompts, which a reward scores as a whole."""

    learner: Learner
    rollouts: RolloutEngine
    sources: TextSources
    settings: TokenUpdates
    rollout: Rollout
    sampling: SamplingSettings
    reward: TextReward
    listeners: Sequence[Show] = ()
    episodes: Episodes | None = None
    """Where responses are conversations with an environment."""

    @property
    def most_actions(self) -> int:
        """Of a sample: bounds what models are asked about at once."""
        turns = 1 if self.episodes is None else self.episodes.spec.turns
        return turns * self.sampling.max_new_tokens

    @property
    def num_samples(self) -> int:
        """Responses of an iteration."""
        return self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt

    @property
    def is_always_asked(self) -> bool:
        """Where another program samples, whose probabilities are compared with the learner's and weighted by that."""
        return self.rollout.engine.max_importance is not None

    def drawn(self, iterations: int) -> dict[str, Draw]:
        """Of a mixture of prompts, how much was drawn of each source."""
        return self.sources.prompts.drawn(iterations)

    def sync(self, iteration: int) -> WeightsVersion:
        """Have the rollout engine take over the learner's weights; collective."""
        return self.rollouts.sync(iteration)

    def sample(self, iteration: int, watch: Watch) -> TextRollouts:
        """This rank's responses to the iteration's prompts; raises Interrupted where it is asked to stop."""
        plan, samples = self.sources.prompts, self.rollout.samples_per_prompt
        (batch,) = plan.micro_batches(iteration)
        assert isinstance(batch, PromptBatch)
        own = range(plan.rank * plan.micro_batch, (plan.rank + 1) * plan.micro_batch)
        keys = draw_keys(plan.sample_ids(iteration), own, samples)
        prompts = repeated_prompts(batch.to(self.learner.engine.device), samples)
        ids = [self._prompt_id(key[0]) for key in keys]

        def watch_turn(share: float) -> None:
            with nullcontext() if self.episodes is None else suppress(Interrupted):  # then all ranks stop after a turn
                watch(share)

        def generate(asked: PromptBatch, asked_keys: Sequence[SampleKey]) -> Sampled:
            return self.rollouts.generate(asked.to(prompts.input_ids_BP.device), asked_keys, self.sampling, watch_turn)

        if self.episodes is None:
            records = samples_of(prompts, keys, generate(prompts, keys), ids, self.reward.decode)
        else:
            records = self.episodes.play(prompts_of(prompts, keys, ids), generate, self._goes_on)
        read = self.reward.read_texts([sample.text for sample in records], [sample.row for sample in records])
        pairs = zip(records, read, strict=True)
        return self.collated([replace(sample, rewards={**sample.rewards, **by}) for sample, by in pairs])

    def _goes_on(self, live: int) -> bool:
        """Whether a conversation of any rank is not over; raises Interrupted on every rank. Collective."""
        raise_if_stopping(self.learner.observer)
        return any(gather_json(live))

    def _prompt_id(self, row: int) -> str:
        records = self.reward.records
        return str(records[row]["id"]) if records else str(row)

    def collated(self, records: Sequence[Sample]) -> TextRollouts:
        """Samples as models read them here."""
        return TextRollouts(records, collate(records, self.sampling.pad_id, self.learner.engine.device))

    def gathered(self, rollouts: TextRollouts) -> TextRollouts:
        """Every rank's responses; collective."""
        return self.collated(gather_samples(rollouts.records))

    def shares(self, samples: Responses, rows: Sequence[int]) -> list[list[int]]:
        """The micro-batches of these rows on this rank, alike in length on all ranks."""
        lengths, plan = samples.attention_mask_BT.sum(dim=1).tolist(), self.sources.prompts
        own = (plan.rank, plan.workers, self.learner.micro_batch)
        models = cast(PolicyModels, self.learner.engine.module)
        if self.rollout.samples_per_prompt > 1 and models.sharing:
            return deal_by_group(rows, lengths, samples.sample_ids_B.tolist(), *own)
        return deal_by_length(rows, lengths, *own)

    def judge(self, module: nn.Module, samples: Responses, wanted: Wanted) -> Mapping[str, Tensor]:
        """The opinion of who is wanted, the actor's with entropy, of critic and reward model where there are any."""
        actor: tuple[Role, ...] = ("actor",) if wanted.policy else ()
        reference: tuple[Role, ...] = ("reference",) if wanted.reference else ()
        critic: tuple[Role, ...] = () if self.settings.value_model is None else ("critic",)
        judge: tuple[Role, ...] = ("reward",) if self.reward.judges else ()
        roles: tuple[Role, ...] = (*actor, *reference, *critic, *judge)
        if not roles:
            return {}
        entropy: Entropy = "measured" if wanted.entropy else "none"
        found: Mapping[str, Tensor] = module(samples, roles, entropy, self.most_actions)
        return found

    def learn(self, module: nn.Module, batch: RlBatch[Responses]) -> Mapping[str, Tensor]:
        """The actor's and the critic's opinion, and the actor's loss on text that is mixed in."""
        roles: tuple[Role, ...] = ("actor",) if batch.returns_BA is None else ("actor", "critic")
        entropy: Entropy = "measured" if batch.old_logprobs_BA is None else "none"
        if self.settings.entropy_coef > 0:
            entropy = "learnt"
        text = None if batch.text is None else batch.text.batch
        found: Mapping[str, Tensor] = module(batch.samples, roles, entropy, self.most_actions, text)
        return found

    def scores(self, rollouts: TextRollouts, scored: ScoredRollouts) -> Tensor:
        """The weighted sum of the reward's terms, less the penalty for a missing end token."""
        scores_N = self.reward.score(self._by_term(rollouts, scored))
        return shaped_scores(scores_N, rollouts.samples.ended_B, self.settings.missing_eos_penalty)

    def earlier_rewards(self, rollouts: TextRollouts) -> Tensor | None:
        """What an environment gave for turns before the last, by its weight; None where there is none."""
        if self.episodes is None:
            return None
        weight, device = self.reward.weights[TERM], self.learner.engine.device
        return weight * earlier_rewards(rollouts.records).to(device)

    def sampled_logprobs(self, rollouts: TextRollouts) -> Tensor:
        """As the rollout engine saw them."""
        return sampler_logprobs(rollouts.records, self.learner.engine.device)

    def report(self, rollouts: TextRollouts, scored: ScoredRollouts, scores_N: Tensor) -> RolloutReport:
        """The iteration in numbers."""
        responses, by_term = rollouts.samples, self._by_term(rollouts, scored)
        return report_rollouts(
            self.reward.raw_score(by_term),
            responses.action_ids,
            responses.action_mask_BA,
            responses.ended_B,
            scored.logprobs_NA,
            scored.reference_logprobs_NA,
            scored.entropy_NA,
            by_term=by_term,
            shaped_scores_N=scores_N,
            sampler_logprobs_NR=self.sampled_logprobs(rollouts),
            turns=None if self.episodes is None else [len(sample.turn_rewards) for sample in rollouts.records],
            max_importance=self.rollout.engine.max_importance,
        )

    def importance(self, rollouts: TextRollouts, scored: ScoredRollouts) -> Tensor | None:
        """Truncated weights of tokens that an engine outside of the learner drew; raises StageError for another policy.

        None: the training ranks sample.
        """
        bound = self.rollout.engine.max_importance
        if bound is None:
            return None
        assert scored.logprobs_NA is not None
        mask_NA, sampler_NA = rollouts.samples.action_mask_BA, self.sampled_logprobs(rollouts)
        gaps_N, scales_N = (scored.logprobs_NA - sampler_NA)[mask_NA], token_scales(sampler_NA[mask_NA])
        require_sampler(gaps_N, scales_N, self.learner.roundoff, rollouts.version)
        return sampler_importance(scored.logprobs_NA, sampler_NA, bound)

    def show(self, iteration: int, rollouts: TextRollouts, scored: ScoredRollouts) -> None:
        """Hand the samples, with all rewards, to those who keep them."""
        if self.listeners:
            by_term = self._by_term(rollouts, scored)
            columns = {name: values_N.tolist() for name, values_N in by_term.items()}
            whole = [
                replace(sample, rewards={name: column[place] for name, column in columns.items()})
                for place, sample in enumerate(rollouts.records)
            ]
            for listener in self.listeners:
                listener(iteration, whole, self.reward.raw_score(by_term).tolist())

    def _by_term(self, rollouts: TextRollouts, scored: ScoredRollouts) -> dict[str, Tensor]:
        scores = [] if scored.scores_N is None else [scored.scores_N]
        read = [sample.rewards for sample in rollouts.records]
        return self.reward.by_term(read, *scores, device=self.learner.engine.device)

    def text_share(self, samples: Responses, rows: Sequence[int], step: int) -> TextShare | None:
        """This rank's share of the step's text, weighted by the mini-batch's response tokens."""
        plan = self.sources.text
        if plan is None:
            return None
        (own,) = plan.micro_batches(step)
        assert isinstance(plan.dataset, Dataset)
        whole = build_batch(plan.dataset, plan.sample_ids(step))
        assert isinstance(own, TokenBatch)
        assert isinstance(whole, TokenBatch)
        response_tokens = float(samples.action_mask_BT[torch.as_tensor(rows)].sum())
        scale = self.settings.text_coef * response_tokens / LanguageModelObjective().weight(whole)
        return TextShare(own.to(self.learner.engine.device), scale)
