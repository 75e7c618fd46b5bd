"""Proximal policy optimisation (Schulman et al. 2017) of responses: its objective, and how experience is estimated.

Shapes: B samples, N samples of all ranks, R response tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recipes.ppo import Ppo, Rollout
from rlhf.advantages import estimate_advantages, whiten
from rlhf.experience import Experience, Judged, PpoBatch, Responses, gather_samples
from rlhf.invariants import require_ratio_one, require_reference, require_version
from rlhf.iterations import Estimate, Update
from rlhf.kl import k3
from rlhf.losses import policy_loss, value_loss
from rlhf.models import Opinions, Role
from rlhf.monitors import report_rollouts
from rlhf.rollout import RolloutEngine, Rollouts, repeated_prompts, response_uniforms
from rlhf.scoring import ScoreStatistics, shaped_scores, token_rewards
from trainers.data.batches import BatchPlan, PromptBatch, TokenBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.order import deal_by_length
from trainers.engine.protocol import Engine
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import ObjectiveOutput

ROLES: tuple[Role, ...] = ("actor", "reference", "critic", "reward")


class PpoObjective:
    """Clipped surrogate, value loss, entropy bonus and the optional KL term, joint over actor and critic."""

    def __init__(self, settings: Ppo, max_new_tokens: int, tolerance: float) -> None:
        self._settings = settings
        self._max_new_tokens = max_new_tokens
        self._tolerance = tolerance

    def weight(self, batch: PpoBatch) -> float:
        """Response tokens: the loss is their mean over the whole optimiser step."""
        return batch.weight

    def loss(self, module: nn.Module, batch: PpoBatch) -> ObjectiveOutput:
        """One forward of the actor and one of the critic over the responses."""
        settings = self._settings
        mask_BR = batch.responses.response_mask_BR
        with_entropy = settings.entropy_coef > 0
        opinions = Opinions(
            **module(batch.responses, ("actor", "critic"), with_entropy, self._max_new_tokens, batch.text)
        )
        assert opinions.logprobs_BR is not None
        assert opinions.values_BR is not None
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
            require_ratio_one(policy.max_ratio_error, self._tolerance)
        value = value_loss(opinions.values_BR, batch.old_values_BR, batch.returns_BR, mask_BR, settings.value_clip)
        actor = policy.loss
        if opinions.entropy_BR is not None:
            actor = actor - settings.entropy_coef * opinions.entropy_BR.sum()
        if batch.kl_coef > 0:
            actor = actor + batch.kl_coef * k3(opinions.logprobs_BR, batch.reference_logprobs_BR).sum()
        text: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        if batch.text is not None and opinions.text_loss is not None:
            actor = actor + batch.text_scale * opinions.text_loss
            text["text_loss"] = (opinions.text_loss.detach(), LanguageModelObjective().weight(batch.text))
        loss = actor * float(batch.actor_learns) + settings.value_coef * value.loss
        tokens = batch.weight
        return ObjectiveOutput(
            loss,
            {
                **text,
                "loss": (loss.detach(), tokens),
                "policy_loss": (policy.loss.detach(), tokens),
                "value_loss": (value.loss.detach(), tokens),
                "value_error": (value.squared_error, tokens),
                "ratio": (policy.ratio, tokens),
                "clip_fraction": (policy.clipped, tokens),
                "value_clip_fraction": (value.clipped, tokens),
                "old_kl": (policy.old_kl, tokens),
            },
        )


Show = Callable[[int, Responses, Tensor], None]
"""Hears of an iteration, its responses and their scores."""


class GaeEstimator:
    """Responses to prompts, judged by the four models, with advantages for every token."""

    def __init__(
        self,
        *,
        engine: Engine,
        rollouts: RolloutEngine,
        prompts: BatchPlan,
        settings: Ppo,
        rollout: Rollout,
        statistics: ScoreStatistics,
        seed: int,
        micro_batch: int,
        tolerance: float,
        text: BatchPlan | None = None,
        show: Show | None = None,
    ) -> None:
        self._engine = engine
        self._rollouts = rollouts
        self._prompts = prompts
        self._settings = settings
        self._rollout = rollout
        self._statistics = statistics
        self._seed = seed
        self._micro_batch = micro_batch
        self._tolerance = tolerance
        self._text = text
        self._show = show

    def estimate(self, iteration: int, kl_coef: float) -> Estimate[Experience]:
        """Sample, score, penalise, estimate advantages: the upper half of the paper's algorithm box."""
        settings = self._settings
        version = self._rollouts.sync(iteration)
        rollouts = self._sampled(iteration)
        require_version(rollouts.version, version)
        responses, judged = gather_samples(rollouts.responses, self._judged(rollouts.responses))
        mask_NR = responses.response_mask_BR
        report = report_rollouts(
            judged.scores_B,
            responses.response_ids,
            mask_NR,
            responses.ended_B,
            judged.logprobs_BR,
            judged.reference_logprobs_BR,
            judged.entropy_BR,
        )
        if iteration == 0:
            require_reference(judged.logprobs_BR, judged.reference_logprobs_BR, self._tolerance)
        if self._show is not None:
            self._show(iteration, responses, judged.scores_B)
        scores_N = shaped_scores(
            self._statistics.normalise(judged.scores_B),
            responses.ended_B,
            settings.score_clip,
            settings.missing_eos_penalty,
        )
        rewards_NR = token_rewards(judged.logprobs_BR, judged.reference_logprobs_BR, scores_N, mask_NR, kl_coef)
        advantages_NR, returns_NR = estimate_advantages(
            rewards_NR, judged.values_BR, mask_NR, settings.gamma, settings.lam
        )
        experience = Experience(responses, judged, whiten(advantages_NR, mask_NR), returns_NR)
        return Estimate(experience, len(scores_N), report)

    def micro_batches(self, experience: Experience, rows: Sequence[int], update: Update) -> Sequence[PpoBatch]:
        """This rank's share, alike in length on all ranks."""
        responses = experience.responses
        lengths = responses.attention_mask_BT.sum(dim=1).tolist()
        shares = deal_by_length(rows, lengths, self._prompts.rank, self._prompts.workers, self._micro_batch)
        batches = [
            experience.batch(
                share,
                kl_coef=update.kl_coef,
                actor_learns=update.iteration >= self._settings.critic_warmup,
                is_untouched=update.is_untouched,
            )
            for share in shares
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

    def _sampled(self, iteration: int) -> Rollouts:
        """This rank's responses to the iteration's prompts."""
        (batch,) = self._prompts.micro_batches(iteration)
        assert isinstance(batch, PromptBatch)
        prompts, keys = repeated_prompts(batch.to(self._engine.device), self._rollout.samples_per_prompt)
        uniforms_BR = response_uniforms(self._seed, "rollout", iteration, keys, self._rollout.max_new_tokens)
        return self._rollouts.generate(prompts, uniforms_BR)

    @torch.no_grad()
    def _judged(self, responses: Responses) -> Judged:
        """What all four models say of this rank's responses, in micro-batches of like length."""
        lengths = responses.attention_mask_BT.sum(dim=1).tolist()
        width = responses.response_mask_BR.shape[1]
        rows_of = deal_by_length(range(len(lengths)), lengths, 0, 1, self._micro_batch)
        table = torch.zeros(4, len(lengths), width, device=self._engine.device)
        scores_B = torch.zeros(len(lengths), device=self._engine.device)
        for rows in rows_of:
            part = responses.rows(rows)
            opinions = Opinions(**self._engine.module(part, ROLES, True, self._rollout.max_new_tokens))
            columns = (
                opinions.logprobs_BR,
                opinions.reference_logprobs_BR,
                opinions.entropy_BR,
                opinions.values_BR,
            )
            for index, column in enumerate(columns):
                assert column is not None
                table[index, rows, : column.shape[1]] = column
            assert opinions.scores_B is not None
            scores_B[rows] = opinions.scores_B
        return Judged(table[0], table[1], table[2], table[3], scores_B)
