"""Proximal policy optimisation (Schulman et al. 2017): its objective, and the source of experience for the one loop.

Shapes: B samples, N samples of all ranks, R response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from recipes.derive import steps_per_iteration
from recipes.errors import StageError
from recipes.ppo import AdaptiveKl, Ppo, Rollout
from rlhf.advantages import estimate_advantages, whiten
from rlhf.experience import Experience, Judged, PpoBatch, Responses, gather_samples, shuffled_rows
from rlhf.kl import adapted_kl_coef, k3
from rlhf.losses import policy_loss, value_loss
from rlhf.models import Opinions, Role
from rlhf.monitors import RolloutReport, broken_rule, report_rollouts
from rlhf.rollout import RolloutEngine, Rollouts, WeightsVersion, repeated_prompts, response_uniforms
from rlhf.scoring import ScoreStatistics, shaped_scores, token_rewards
from trainers.data.batches import BatchPlan, PromptBatch, TokenBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.order import deal_by_length
from trainers.engine.protocol import Engine
from trainers.loop import Observer, SourceState
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import ObjectiveOutput

UNTOUCHED_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest |ratio - 1| and |log-ratio to the reference| before anything was learnt."""

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
        if batch.is_untouched and float(policy.max_ratio_error) > self._tolerance:
            raise StageError(
                f"the policy that samples and the one that learns disagree: |ratio - 1| is "
                f"{float(policy.max_ratio_error):.2e} before the first update (at most {self._tolerance:.0e})"
            )
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


@dataclass(frozen=True)
class _Prepared:
    """An iteration's experience and what follows from its rollouts."""

    iteration: int
    experience: Experience
    report: RolloutReport
    kl_coef: float
    """The coefficient of this iteration."""
    next_kl_coef: float


@dataclass(frozen=True)
class _Progress:
    """What the iterations before the next one have left behind."""

    kl_coef: float
    start: RolloutReport | None = None
    best_score: float | None = None
    best_iteration: int | None = None
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """The trained parameters of the best iteration that kept all rules; empty without a stop rule."""


Show = Callable[[int, Responses, Tensor], None]
"""Hears of an iteration, its responses and their scores."""


class PpoSource:
    """Gives the loop its mini-batches; each iteration begins with rollouts from the policy as it then is.

    Saving is possible between iterations only: there the experience is used up, so a resumed stage draws the same one.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        rollouts: RolloutEngine,
        prompts: BatchPlan,
        settings: Ppo,
        rollout: Rollout,
        statistics: ScoreStatistics,
        trained: Sequence[str],
        seed: int,
        micro_batch: int,
        tolerance: float,
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
        self._trained = tuple(trained)
        self._seed = seed
        self._micro_batch = micro_batch
        self._tolerance = tolerance
        self._observer = observer
        self._text = text
        self._show = show
        self._prepared: _Prepared | None = None
        self._progress = _Progress(kl_coef=settings.kl_coef)

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps between two rollouts."""
        return steps_per_iteration(self._settings)

    @property
    def steps_planned(self) -> int:
        """Optimiser steps of all iterations."""
        return self._settings.iterations * self.steps_per_iteration

    def can_save(self, steps_done: int) -> bool:
        """Between iterations."""
        return steps_done % self.steps_per_iteration == 0

    def state(self) -> SourceState:
        """The controller, the first iteration's report and the best policy so far."""
        progress = self._progress
        return SourceState(
            values={
                "kl_coef": progress.kl_coef,
                "start": None if progress.start is None else progress.start.metrics(),
                "best_score": progress.best_score,
                "best_iteration": progress.best_iteration,
            },
            tensors=dict(progress.best),
        )

    def load_state(self, state: SourceState) -> None:
        """Take over a saved state."""
        start = state.values["start"]
        self._prepared = None
        self._progress = _Progress(
            kl_coef=state.values["kl_coef"],
            start=None if start is None else RolloutReport(**start),
            best_score=state.values["best_score"],
            best_iteration=state.values["best_iteration"],
            best=dict(state.tensors),
        )

    def micro_batches(self, step: int) -> Sequence[PpoBatch]:
        """This rank's part of the step's mini-batch."""
        iteration, within = divmod(step, self.steps_per_iteration)
        epoch, index = divmod(within, self._settings.mini_batches)
        prepared = self._begin(iteration)
        if within == 0:
            self._progress = self._after(prepared)
        responses = prepared.experience.responses
        order = shuffled_rows(self._seed, iteration, epoch, len(responses.sample_ids_B))
        size = len(order) // self._settings.mini_batches
        rows = order[index * size : (index + 1) * size]
        lengths = responses.attention_mask_BT.sum(dim=1).tolist()
        shares = deal_by_length(rows, lengths, self._prompts.rank, self._prompts.workers, self._micro_batch)
        batches = [
            prepared.experience.batch(
                share,
                kl_coef=prepared.kl_coef if self._settings.kl_in == "loss" else 0.0,
                actor_learns=iteration >= self._settings.critic_warmup,
                is_untouched=step == 0,
            )
            for share in shares
        ]
        response_tokens = float(responses.response_mask_BT[torch.as_tensor(rows)].sum())
        return [self._with_text(batches[0], step, response_tokens), *batches[1:]]

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

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Between iterations, let the policy write again and hold what it wrote against the stop rules."""
        if not self.can_save(steps_done):
            return None
        return broken_rule(self._begin(steps_done // self.steps_per_iteration).report, self._settings.kl_limit)

    def start_report(self) -> RolloutReport:
        """The rollouts before the first update."""
        assert self._progress.start is not None
        return self._progress.start

    def final_report(self, steps_done: int) -> RolloutReport:
        """Rollouts after the last update; collective."""
        return self._begin(steps_done // self.steps_per_iteration).report

    def best(self) -> tuple[int, Mapping[str, Tensor]]:
        """The iteration whose policy scored best while it kept all rules, and its trained parameters."""
        assert self._progress.best_iteration is not None
        return self._progress.best_iteration, self._progress.best

    def _begin(self, iteration: int) -> _Prepared:
        """The iteration's experience, made once."""
        if self._prepared is None or self._prepared.iteration != iteration:
            self._prepared = None
            step = iteration * self.steps_per_iteration
            self._observer.phase("rollout", step=step, steps_planned=self.steps_planned)
            self._prepared = self._iterate(iteration)
            report = self._prepared.report
            self._observer.metrics(
                step,
                {
                    **report.metrics(),
                    "kl_alarm": float(report.kl_is_negative),
                    "kl_coef": self._prepared.kl_coef,
                    "iteration": float(iteration),
                },
            )
            if self._show is not None:
                experience = self._prepared.experience
                self._show(iteration, experience.responses, experience.judged.scores_B)
        return self._prepared

    def _iterate(self, iteration: int) -> _Prepared:
        """Sample, score, penalise, estimate advantages: the upper half of the paper's algorithm box."""
        settings, kl_coef = self._settings, self._progress.kl_coef
        version = self._rollouts.sync(iteration)
        rollouts = self._sampled(iteration)
        require_version(rollouts, version)
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
            require_reference(judged, self._tolerance)
        scores_N = shaped_scores(
            self._statistics.normalise(judged.scores_B),
            responses.ended_B,
            settings.score_clip,
            settings.missing_eos_penalty,
        )
        rewards_NR = token_rewards(
            judged.logprobs_BR,
            judged.reference_logprobs_BR,
            scores_N,
            mask_NR,
            kl_coef if settings.kl_in == "reward" else 0.0,
        )
        advantages_NR, returns_NR = estimate_advantages(
            rewards_NR, judged.values_BR, mask_NR, settings.gamma, settings.lam
        )
        experience = Experience(responses, judged, whiten(advantages_NR, mask_NR), returns_NR)
        return _Prepared(iteration, experience, report, kl_coef, self._next_kl_coef(kl_coef, report, len(scores_N)))

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

    def _next_kl_coef(self, kl_coef: float, report: RolloutReport, num_samples: int) -> float:
        match self._settings.kl_controller:
            case AdaptiveKl() as controller:
                return adapted_kl_coef(kl_coef, report.kl, controller.target, controller.horizon, num_samples)
            case _:
                return kl_coef

    def _after(self, prepared: _Prepared) -> _Progress:
        """Progress once this iteration's update begins."""
        progress = replace(self._progress, kl_coef=prepared.next_kl_coef)
        if prepared.iteration == 0:
            progress = replace(progress, start=prepared.report)
        score = prepared.report.score_mean
        is_best = progress.best_score is None or score > progress.best_score
        if self._settings.kl_limit is None or not is_best:
            return progress
        best = {name: tensor.clone() for name, tensor in self._engine.full_parameters(self._trained)}
        return replace(progress, best_score=score, best_iteration=prepared.iteration, best=best)


def require_version(rollouts: Rollouts, wanted: WeightsVersion) -> None:
    """Stop the stage if the responses were not written by the learner's present weights."""
    if rollouts.version != wanted:
        raise StageError(
            f"rollouts come from weights {rollouts.version.digest[:12]} of iteration {rollouts.version.iteration}; "
            f"the learner holds {wanted.digest[:12]} of iteration {wanted.iteration}"
        )


def require_reference(judged: Judged, tolerance: float) -> None:
    """Stop the stage if actor and reference differ before anything was learnt."""
    difference = float((judged.logprobs_BR - judged.reference_logprobs_BR).abs().max())
    if difference > tolerance:
        raise StageError(
            f"the actor is not its reference at the start: log-probabilities differ by {difference:.2e} "
            f"(at most {tolerance:.0e})"
        )
