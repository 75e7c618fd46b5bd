"""Iterations as the source of the one loop: rollouts from the policy as it then is, then epochs of mini-batches.

What is sampled is the policy's affair, and how it is learnt from the algorithm's: here is what an iteration is, and
when it ends.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from recipes.errors import Preempted
from recipes.stages.updates import AdaptiveKl
from rlhf.algorithms.kl import adapted_kl_coef
from rlhf.experience import Estimate, ExperienceMaker, Update
from rlhf.monitors import Report, broken_rule
from rlhf.policy import S
from trainers.checkpoint.loop_state import SourceState
from trainers.data.mixture import Draw
from trainers.runtime.observer import Interrupted
from trainers.training.context import StageContext
from trainers.training.outcome import Outcome


@dataclass(frozen=True)
class _Prepared(Generic[S]):
    """An iteration's estimate and the coefficients around it."""

    iteration: int
    estimate: Estimate[S]
    kl_coef: float
    """The coefficient of this iteration."""
    next_kl_coef: float


@dataclass(frozen=True)
class _Progress:
    """What the iterations before the next one have left behind."""

    kl_coef: float
    start: Mapping[str, float] | None = None
    """The first iteration's report."""
    best_score: float | None = None
    best_iteration: int | None = None
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """The trained parameters of the best iteration that kept all rules; empty without a stop rule."""


class RlSource(Generic[S]):
    """Gives the loop its mini-batches; each iteration begins with rollouts from the policy as it then is.

    Saving is possible between iterations only: there the experience is used up, so a resumed stage draws the same one.
    """

    def __init__(self, experience: ExperienceMaker[S], trained: Sequence[str]) -> None:
        self.experience = experience
        self.settings = experience.settings
        self.engine = experience.learner.engine
        self._trained = tuple(trained)
        self._seed = experience.learner.seed
        self._observer = experience.learner.observer
        self._prepared: _Prepared[S] | None = None
        self._progress = _Progress(kl_coef=self.settings.kl_coef)

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.settings.steps_per_iteration

    @property
    def steps_planned(self) -> int:
        """Optimiser steps of all iterations."""
        return self.settings.iterations * self.steps_per_iteration

    def drawn(self, steps_done: int) -> dict[str, Draw]:
        """Of a mixture of prompts, how much was drawn of each source in the iterations that were learnt from."""
        return self.experience.policy.drawn(steps_done // self.steps_per_iteration)

    def can_save(self, steps_done: int) -> bool:
        """Between iterations."""
        return steps_done % self.steps_per_iteration == 0

    def state(self) -> SourceState:
        """The controller, the first iteration's report and the best policy so far."""
        progress = self._progress
        return SourceState(
            values={
                "kl_coef": progress.kl_coef,
                "start": None if progress.start is None else dict(progress.start),
                "best_score": progress.best_score,
                "best_iteration": progress.best_iteration,
            },
            tensors=dict(progress.best),
        )

    def load_state(self, state: SourceState) -> None:
        """Take over a saved state."""
        self._prepared = None
        self._progress = _Progress(**state.values, best=dict(state.tensors))

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This rank's part of the step's mini-batch."""
        iteration, within = divmod(step, self.steps_per_iteration)
        epoch, index = divmod(within, self.settings.mini_batches)
        prepared = self._begin(iteration)
        if within == 0:
            self._progress = self._after(prepared)
        rows = self._mini_batches(iteration, epoch)[index]
        kl_coef = prepared.kl_coef if self.settings.kl_in == "loss" else 0.0
        update = Update(step, iteration, kl_coef, is_untouched=within == 0)
        return self.experience.micro_batches(prepared.estimate.experience, rows, update)

    def _mini_batches(self, iteration: int, epoch: int) -> list[list[int]]:
        """The rows of an epoch's mini-batches."""
        num_samples = self.experience.policy.num_samples
        return dealt_rows(self._seed, iteration, epoch, num_samples, self.settings.mini_batches)

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Between iterations, let the policy sample again and hold what it made against the stop rules."""
        if not self.can_save(steps_done):
            return None
        return broken_rule(self.report(steps_done), self.settings.kl_limit)

    def start(self) -> Mapping[str, float]:
        """The report on the rollouts before the first update."""
        assert self._progress.start is not None
        return self._progress.start

    def report(self, steps_done: int) -> Report:
        """The report on rollouts between iterations, after so many steps; collective."""
        return self._begin(steps_done // self.steps_per_iteration).estimate.report

    def best(self) -> tuple[int, Mapping[str, Tensor]]:
        """The iteration whose policy scored best while it kept all rules, and its trained parameters."""
        assert self._progress.best_iteration is not None
        return self._progress.best_iteration, self._progress.best

    def return_to_best(self) -> None:
        """Put the best policy back into the engine, at the end of the stage; collective."""
        _, best = self.best()

        def read(group: str, name: str, start: int, stop: int) -> Tensor:
            return best[name].reshape(-1)[start:stop].float() if group == "param" else torch.zeros(stop - start)

        self.engine.state_in(read, steps_applied=self.engine.steps_applied)

    def _begin(self, iteration: int) -> _Prepared[S]:
        """The iteration's experience, made once."""
        if self._prepared is None or self._prepared.iteration != iteration:
            self._prepared = None
            step = iteration * self.steps_per_iteration
            self._observer.phase("rollout", step=step, steps_planned=self.steps_planned)
            self._prepared = self._prepare(iteration)
            report = self._prepared.estimate.report
            self._observer.metrics(
                step,
                {
                    **report.metrics(),
                    **self._prepared.estimate.filtered,
                    "kl_alarm": float(report.kl_alarm),
                    "kl_coef": self._prepared.kl_coef,
                    "iteration": float(iteration),
                },
            )
        return self._prepared

    def _prepare(self, iteration: int) -> _Prepared[S]:
        settings, kl_coef = self.settings, self._progress.kl_coef
        in_reward = kl_coef if settings.kl_in == "reward" else 0.0
        estimate = self.experience.estimate(iteration, in_reward, self._mini_batches(iteration, 0))
        match settings.kl_controller:
            case AdaptiveKl(target=target, horizon=horizon):
                assert estimate.report.kl is not None
                following = adapted_kl_coef(
                    kl_coef, estimate.report.kl, target, horizon, self.experience.policy.num_samples
                )
            case _:
                following = kl_coef
        return _Prepared(iteration, estimate, kl_coef, following)

    def _after(self, prepared: _Prepared[S]) -> _Progress:
        """Progress once this iteration's update begins."""
        report = prepared.estimate.report
        progress = replace(self._progress, kl_coef=prepared.next_kl_coef)
        if prepared.iteration == 0:
            progress = replace(progress, start=report.metrics())
        is_best = progress.best_score is None or report.optimised_score > progress.best_score
        if self.settings.kl_limit is None or not is_best:
            return progress
        best = {name: tensor.clone() for name, tensor in self.engine.full_parameters(self._trained)}
        return replace(progress, best_score=report.optimised_score, best_iteration=prepared.iteration, best=best)


def shuffled_rows(seed: int, iteration: int, epoch: int, num_samples: int) -> list[int]:
    """Order of an epoch's samples: keyed by the seed, never by rank."""
    key = hashlib.blake2b(f"{seed}\nmini-batches\n{iteration}\n{epoch}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return [int(row) for row in generator.permutation(num_samples)]


def dealt_rows(seed: int, iteration: int, epoch: int, num_samples: int, mini_batches: int) -> list[list[int]]:
    """Those of an epoch's mini-batches."""
    order = shuffled_rows(seed, iteration, epoch, num_samples)
    size = len(order) // mini_batches
    return [order[index * size : (index + 1) * size] for index in range(mini_batches)]


@dataclass(frozen=True)
class RlOutcome:
    """How the iterations ended, and what the policy then does."""

    outcome: Outcome
    start: Mapping[str, float]
    """The report on the rollouts before the first update."""
    final: Report
    metrics: Mapping[str, Any]
    """The stage's standard report."""
    gate_reasons: tuple[str, ...]


def finish_iterations(source: RlSource[Any], context: StageContext, outcome: Outcome) -> RlOutcome:
    """Measure the policy after its last update; stopped by a rule, go back to the best one. Collective."""
    try:
        final = source.report(outcome.steps_done)
    except Interrupted:
        raise Preempted("stopped in the rollouts after the last update; the state is saved") from None
    if outcome.state == "stopped_by":
        source.return_to_best()
    context.observer.phase("write")
    start = source.start()
    return RlOutcome(outcome, start, final, stage_metrics(outcome, source, final), gate_reasons(start, final))


def stage_metrics(outcome: Outcome, source: RlSource[Any], final: Report) -> dict[str, Any]:
    """The stage's standard report: rollouts before the first and after the last update, and which policy was kept."""
    kept = {} if outcome.state == "completed" else {"kept_iteration": source.best()[0]}
    return {
        "start": dict(source.start()),
        "end": final.metrics(),
        **kept,
        **outcome.amounts(),
    }


def gate_reasons(start: Mapping[str, float], final: Report) -> tuple[str, ...]:
    """Why later stages should not build on the policy: it lost what it was trained for."""
    if final.score_mean < start["score_mean"] - 0.5 * start["score_std"]:
        return (f"the mean score fell from {start['score_mean']:.3f} to {final.score_mean:.3f}",)
    return ()
