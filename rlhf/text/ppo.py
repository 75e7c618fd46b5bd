"""Proximal policy optimisation (Schulman et al. 2017) of responses: its objective, and how experience is estimated.

Shapes: B samples, N samples of all ranks, R response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recipes.stages.ppo import Ppo, Rollout
from rlhf.algorithms.advantages import CreditAssignment, Rewarded
from rlhf.algorithms.kl import kl_in_loss
from rlhf.algorithms.losses import policy_loss, value_loss
from rlhf.algorithms.scoring import ScoreStatistics, shaped_scores, token_rewards
from rlhf.experience import (
    Experience,
    Judged,
    PpoBatch,
    Responses,
    gather_responses,
    gather_rows,
    join_tables,
)
from rlhf.invariants import require_ratio_one, require_reference, require_version, token_scales
from rlhf.iterations import Estimate, Update, iteration_place
from rlhf.monitors import report_rollouts
from rlhf.text.policy import Opinions, Role
from rlhf.text.rollout import RolloutEngine, Rollouts, draw_keys, repeated_prompts
from trainers.data.batches import BatchPlan, PromptBatch, TokenBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.order import deal_by_length
from trainers.engine.protocol import Engine
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import ObjectiveOutput
from trainers.runtime.observer import Observer, agreed, raise_if_stopping, watching


class PpoObjective:
    """Clipped surrogate, entropy bonus and the optional KL term; with a critic its value loss, joint with them."""

    def __init__(self, settings: Ppo, max_new_tokens: int, roundoff: float) -> None:
        self._settings = settings
        self._max_new_tokens = max_new_tokens
        self._roundoff = roundoff

    def weight(self, batch: PpoBatch) -> float:
        """Response tokens: the loss is their mean over the whole optimiser step."""
        return batch.weight

    def loss(self, module: nn.Module, batch: PpoBatch) -> ObjectiveOutput:
        """One forward of the actor, and of the critic where there is one, over the responses."""
        settings = self._settings
        roles: tuple[Role, ...] = ("actor",) if batch.returns_BR is None else ("actor", "critic")
        mask_BR = batch.responses.response_mask_BR
        with_entropy = settings.entropy_coef > 0
        opinions = Opinions(**module(batch.responses, roles, with_entropy, self._max_new_tokens, batch.text))
        assert opinions.logprobs_BR is not None
        policy = policy_loss(
            opinions.logprobs_BR,
            batch.old_logprobs_BR,
            batch.advantages_BR,
            mask_BR,
            settings.clip_low,
            settings.clip_high,
            settings.dual_clip,
        )
        if batch.is_untouched:
            log_ratios_N = (opinions.logprobs_BR - batch.old_logprobs_BR)[mask_BR]
            require_ratio_one(log_ratios_N, token_scales(batch.old_logprobs_BR[mask_BR]), self._roundoff)
        actor = policy.loss
        if opinions.entropy_BR is not None:
            actor = actor - settings.entropy_coef * opinions.entropy_BR.sum()
        if batch.kl_coef > 0:
            penalty_BR = kl_in_loss(opinions.logprobs_BR, batch.old_logprobs_BR, batch.reference_logprobs_BR)
            actor = actor + batch.kl_coef * penalty_BR.sum()
        text: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        if batch.text is not None and opinions.text_loss is not None:
            actor = actor + batch.text_scale * opinions.text_loss
            text["text_loss"] = (opinions.text_loss.detach(), LanguageModelObjective().weight(batch.text))
        loss = actor * float(batch.actor_learns)
        tokens = batch.weight
        critic: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        if batch.returns_BR is not None:
            assert opinions.values_BR is not None
            assert batch.old_values_BR is not None
            value = value_loss(opinions.values_BR, batch.old_values_BR, batch.returns_BR, mask_BR, settings.value_clip)
            loss = loss + settings.value_coef * value.loss
            critic = {
                "value_loss": (value.loss.detach(), tokens),
                "value_error": (value.squared_error, tokens),
                "value_clip_fraction": (value.clipped, tokens),
            }
        return ObjectiveOutput(
            loss,
            {
                **text,
                **critic,
                "loss": (loss.detach(), tokens),
                "policy_loss": (policy.loss.detach(), tokens),
                "ratio": (policy.ratio, tokens),
                "log_ratio": (policy.log_ratio, tokens),
                "clip_fraction": (policy.clipped, tokens),
                "old_kl": (policy.old_kl, tokens),
            },
            {"log_ratio_max": policy.max_log_ratio},
        )


Show = Callable[[int, Responses, Tensor], None]
"""Hears of an iteration, its responses and their scores."""


class ResponseExperience:
    """Responses to prompts, judged by the models, with the credit that each token gets."""

    def __init__(
        self,
        *,
        engine: Engine,
        rollouts: RolloutEngine,
        prompts: BatchPlan,
        settings: Ppo,
        rollout: Rollout,
        statistics: ScoreStatistics,
        credit: CreditAssignment,
        micro_batch: int,
        roundoff: float,
        observer: Observer,
        text: BatchPlan | None = None,
        show: Show | None = None,
    ) -> None:
        self._engine = engine
        self._rollouts = rollouts
        self._prompts = prompts
        self._settings = settings
        self._rollout = rollout
        self._statistics = statistics
        self._credit = credit
        critic: tuple[Role, ...] = ("critic",) if credit.needs_critic else ()
        self._roles: tuple[Role, ...] = ("actor", "reference", *critic, "reward")
        self._micro_batch = micro_batch
        self._roundoff = roundoff
        self._observer = observer
        self._text = text
        self._show = show

    @property
    def num_samples(self) -> int:
        """Responses of an iteration."""
        return self._rollout.prompts_per_iteration * self._rollout.samples_per_prompt

    def estimate(self, iteration: int, kl_coef: float, first_epoch: Sequence[Sequence[int]]) -> Estimate[Experience]:
        """Sample, score, penalise, estimate advantages: the upper half of the paper's algorithm box."""
        settings = self._settings
        version = self._rollouts.sync(iteration)
        place = iteration_place(settings, iteration)
        rollouts = agreed(self._observer, lambda: self._sampled(iteration, place))
        require_version(rollouts.version, version)
        responses = gather_responses(rollouts.responses)
        judged = self._judged(responses, first_epoch, place)
        mask_NR = responses.response_mask_BR
        if iteration == 0:
            own_N, reference_N = judged.logprobs_BR[mask_NR], judged.reference_logprobs_BR[mask_NR]
            require_reference(own_N, reference_N, token_scales(reference_N), self._roundoff)
        if self._show is not None:
            self._show(iteration, responses, judged.scores_B)
        scores_N = shaped_scores(
            self._statistics.normalise(judged.scores_B),
            responses.ended_B,
            settings.score_clip,
            settings.missing_eos_penalty,
        )
        rewards_NR = token_rewards(judged.logprobs_BR, judged.reference_logprobs_BR, scores_N, mask_NR, kl_coef)
        credit = self._credit(Rewarded(rewards_NR, mask_NR, judged.values_BR, responses.sample_ids_B))
        report = report_rollouts(
            judged.scores_B,
            responses.response_ids,
            mask_NR,
            responses.ended_B,
            judged.logprobs_BR,
            judged.reference_logprobs_BR,
            judged.entropy_BR,
            shaped_scores_N=scores_N,
            sampler_logprobs_NR=gather_rows(rollouts.logprobs_BR)[:, : mask_NR.shape[1]],
        )
        return Estimate(Experience(responses, judged, credit), report)

    def micro_batches(self, experience: Experience, rows: Sequence[int], update: Update) -> Sequence[PpoBatch]:
        """This rank's share of a mini-batch; a penalty in the loss is in the unit of the whitened advantages there."""
        responses = experience.responses
        batches = [
            experience.batch(
                share,
                kl_coef=update.kl_coef / experience.credit.deviation,
                actor_learns=update.iteration >= self._settings.critic_warmup,
                is_untouched=update.is_untouched,
            )
            for share in self._shares(responses, rows)
        ]
        response_tokens = float(responses.response_mask_BT[torch.as_tensor(rows)].sum())
        return [self._with_text(batches[0], update.step, response_tokens), *batches[1:]]

    def _with_text(self, batch: PpoBatch, step: int, response_tokens: float) -> PpoBatch:
        """The rank's first micro-batch with the rank's share of the step's text, if the stage mixes text in."""
        if self._text is None:
            return batch
        (own,) = self._text.micro_batches(step)
        assert isinstance(self._text.dataset, Dataset)
        whole = build_batch(self._text.dataset, self._text.sample_ids(step))
        assert isinstance(own, TokenBatch)
        assert isinstance(whole, TokenBatch)
        scale = self._settings.text_coef * response_tokens / LanguageModelObjective().weight(whole)
        return replace(batch, text=own.to(self._engine.device), text_scale=scale)

    def _sampled(self, iteration: int, place: Mapping[str, float]) -> Rollouts:
        """This rank's responses to the iteration's prompts; raises Interrupted where it is asked to stop."""
        plan, samples = self._prompts, self._rollout.samples_per_prompt
        (batch,) = plan.micro_batches(iteration)
        assert isinstance(batch, PromptBatch)
        own = range(plan.rank * plan.micro_batch, (plan.rank + 1) * plan.micro_batch)
        keys = draw_keys(plan.sample_ids(iteration), own, samples)
        prompts = repeated_prompts(batch.to(self._engine.device), samples)
        watch = watching(self._observer, "rollout", self.num_samples, **place)
        watch(0.0)
        return self._rollouts.generate(prompts, keys, watch)

    def _shares(self, responses: Responses, rows: Sequence[int]) -> list[list[int]]:
        """The micro-batches of a mini-batch of these rows on this rank, alike in length on all ranks."""
        lengths = responses.attention_mask_BT.sum(dim=1).tolist()
        return deal_by_length(rows, lengths, self._prompts.rank, self._prompts.workers, self._micro_batch)

    @torch.no_grad()
    def _judged(self, responses: Responses, first_epoch: Sequence[Sequence[int]], place: Mapping[str, float]) -> Judged:
        """What the models say of every rank's responses, each judged by the rank that first learns from it."""
        count, width = responses.response_mask_BR.shape
        table = torch.zeros(3 + self._credit.needs_critic, count, width, device=self._engine.device)
        scores_N = torch.zeros(count, device=self._engine.device)
        shares = [share for mini_batch in first_epoch for share in self._shares(responses, mini_batch)]
        for number, rows in enumerate(shares):
            self._observer.phase("judge", rows=number * count // len(shares), rows_planned=count, **place)
            raise_if_stopping(self._observer)
            part = responses.rows(rows)
            opinions = Opinions(**self._engine.module(part, self._roles, True, self._rollout.max_new_tokens))
            columns = (opinions.logprobs_BR, opinions.reference_logprobs_BR, opinions.entropy_BR, opinions.values_BR)
            for index, column in enumerate(columns[: len(table)]):
                assert column is not None
                table[index, rows, : column.shape[1]] = column
            assert opinions.scores_B is not None
            scores_N[rows] = opinions.scores_B
        table, scores_N = join_tables(table, scores_N)
        values_NR = table[3] if self._credit.needs_critic else None
        return Judged(table[0], table[1], table[2], values_NR, scores_N)
