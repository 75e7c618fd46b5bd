"""Responses as what is sampled: prompts answered by a rollout engine, scored by a reward model, learnt token by token.

Shapes: B samples, N samples of all ranks, R response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.stages.algorithms import TokenUpdates
from recipes.stages.rollout import Rollout
from rlhf.algorithms.scoring import ScoreStatistics, shaped_scores
from rlhf.experience import RlBatch, gather_rows
from rlhf.monitors import RolloutReport, report_rollouts
from rlhf.policy import Learner, ScoredRollouts, TextShare
from rlhf.text.policy import Role
from rlhf.text.responses import Responses, draw_keys, gather_responses, repeated_prompts, responses_of
from trainers.data.batches import BatchPlan, PromptBatch, TokenBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.order import deal_by_length
from trainers.inference.generation import SamplingSettings
from trainers.inference.rollouts import RolloutEngine, WeightsVersion
from trainers.objectives.language_model import LanguageModelObjective
from trainers.runtime.observer import Watch

Show = Callable[[int, Responses, Tensor], None]
"""Hears of an iteration, its responses and their scores."""


@dataclass(frozen=True)
class TextRollouts:
    """Responses and the policy that wrote them."""

    samples: Responses
    logprobs_BR: Tensor
    """Of the drawn tokens as the sampler saw them, at its temperature; 0 past a response's end."""
    version: WeightsVersion

    @property
    def groups_B(self) -> Tensor:
        """Rows of the prompts."""
        return self.samples.sample_ids_B


@dataclass(frozen=True)
class TextSources:
    """What a policy reads: prompts to answer, and text that is mixed into the updates."""

    prompts: BatchPlan
    text: BatchPlan | None = None


@dataclass
class TextPolicy:
    """Responses to prompts, which a reward model scores as a whole."""

    learner: Learner
    rollouts: RolloutEngine
    sources: TextSources
    settings: TokenUpdates
    rollout: Rollout
    sampling: SamplingSettings
    statistics: ScoreStatistics
    show_samples: Show | None = None

    @property
    def num_samples(self) -> int:
        """Responses of an iteration."""
        return self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt

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
        drawn = self.rollouts.generate(prompts, keys, self.sampling, watch)
        ended = [reason == "stop" for reason in drawn.stop_reasons]
        ended_B = torch.tensor(ended, device=drawn.tokens_BR.device)
        responses = responses_of(prompts, drawn.tokens_BR, drawn.response_mask_BR, ended_B)
        return TextRollouts(responses, drawn.logprobs_BR, drawn.version)

    def gathered(self, rollouts: TextRollouts) -> TextRollouts:
        """Every rank's responses; collective."""
        responses = gather_responses(rollouts.samples)
        width = responses.action_mask_BA.shape[1]
        return TextRollouts(responses, gather_rows(rollouts.logprobs_BR)[:, :width], rollouts.version)

    def shares(self, samples: Responses, rows: Sequence[int]) -> list[list[int]]:
        """The micro-batches of these rows on this rank, alike in length on all ranks."""
        lengths, plan = samples.attention_mask_BT.sum(dim=1).tolist(), self.sources.prompts
        return deal_by_length(rows, lengths, plan.rank, plan.workers, self.learner.micro_batch)

    def judge(self, module: nn.Module, samples: Responses) -> Mapping[str, Tensor]:
        """Every role's opinion: actor with entropy, reference, critic where there is one, reward model."""
        critic: tuple[Role, ...] = () if self.settings.value_model is None else ("critic",)
        roles: tuple[Role, ...] = ("actor", "reference", *critic, "reward")
        found: Mapping[str, Tensor] = module(samples, roles, True, self.rollout.max_new_tokens)
        return found

    def learn(self, module: nn.Module, batch: RlBatch[Responses]) -> Mapping[str, Tensor]:
        """The actor's and the critic's opinion, and the actor's loss on text that is mixed in."""
        roles: tuple[Role, ...] = ("actor",) if batch.returns_BA is None else ("actor", "critic")
        text, with_entropy = None if batch.text is None else batch.text.batch, self.settings.entropy_coef > 0
        found: Mapping[str, Tensor] = module(batch.samples, roles, with_entropy, self.rollout.max_new_tokens, text)
        return found

    def scores(self, rollouts: TextRollouts, scored: ScoredRollouts) -> Tensor:
        """Normalised, clipped, and less the penalty for a missing end token."""
        assert scored.scores_N is not None
        return shaped_scores(
            self.statistics.normalise(scored.scores_N),
            rollouts.samples.ended_B,
            self.settings.score_clip,
            self.settings.missing_eos_penalty,
        )

    def report(self, rollouts: TextRollouts, scored: ScoredRollouts, scores_N: Tensor) -> RolloutReport:
        """The iteration in numbers."""
        responses = rollouts.samples
        assert scored.scores_N is not None
        assert scored.entropy_NA is not None
        return report_rollouts(
            scored.scores_N,
            responses.response_ids,
            responses.action_mask_BA,
            responses.ended_B,
            scored.logprobs_NA,
            scored.reference_logprobs_NA,
            scored.entropy_NA,
            shaped_scores_N=scores_N,
            sampler_logprobs_NR=rollouts.logprobs_BR,
        )

    def show(self, iteration: int, rollouts: TextRollouts, scored: ScoredRollouts) -> None:
        """Keep some responses for the run's report."""
        if self.show_samples is not None:
            assert scored.scores_N is not None
            self.show_samples(iteration, rollouts.samples, scored.scores_N)

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
        response_tokens = float(samples.response_mask_BT[torch.as_tensor(rows)].sum())
        scale = self.settings.text_coef * response_tokens / LanguageModelObjective().weight(whole)
        return TextShare(own.to(self.learner.engine.device), scale)
