"""The one training loop: time, skipping, saving, evaluating, stopping; objectives and sources know the rest."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import NoReturn, Protocol

from recipes.errors import Preempted, StageError
from recipes.stages.answers import Cadence
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.data.mixture import Draw
from trainers.engine.joint import JointState
from trainers.engine.protocol import Engine, StatefulEngine
from trainers.objectives.protocol import Objective
from trainers.runtime import distributed
from trainers.runtime.observer import Interrupted, Observer
from trainers.training.optimiser_step import BatchSource, LearningRates, Phase, run_step
from trainers.training.outcome import Evaluate, Evaluation, Outcome

STOP_WAIT_S = 5.0
"""How long a stop waits for the next state that can be saved."""


class Checkpoint(Protocol):
    """Writes and reads training state; collective."""

    def save(self, engine: StatefulEngine, loop: LoopState, source: SourceState) -> None:
        """Take a resumable state, which is committed by the next `flush` at the latest."""

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way on this rank."""

    def check(self) -> None:
        """Raise the error of a save that has failed since; never waits, no collective."""

    def flush(self) -> None:
        """Return when all that was saved is committed."""

    def restore(self, engine: StatefulEngine) -> tuple[LoopState, SourceState] | None:
        """Load the newest committed state into the engine; None: there is none."""


def train(
    engine: Engine,
    objective: Objective,
    source: BatchSource,
    *,
    learning_rates: LearningRates,
    cadence: Cadence,
    checkpoint: Checkpoint,
    evaluate: Evaluate | None,
    observer: Observer,
    seed: int,
    further: Sequence[Phase] = (),
) -> Outcome:
    """Train to the end of the source or to a stop rule, resuming from the newest state; collective.

    `further` phases follow in every step on the same batches; a phase whose update is skipped ends the step. Raises
    Preempted after saving when any rank was asked to stop, StageError past the limit of skipped steps.
    """
    phases = [Phase("", engine, objective, learning_rates), *further]
    training = _Training(phases, source, cadence, checkpoint, evaluate, observer, seed)
    training.restore()
    with observer.answers_stops(training.has_unsaved):
        return training.run()


class _Training:
    """A training under way: where it is, and what of it is saved."""

    def __init__(
        self,
        phases: Sequence[Phase],
        source: BatchSource,
        cadence: Cadence,
        checkpoint: Checkpoint,
        evaluate: Evaluate | None,
        observer: Observer,
        seed: int,
    ) -> None:
        self._phases = phases
        engines = [phase.engine for phase in phases]
        self._whole: StatefulEngine = engines[0] if len(engines) == 1 else JointState(engines)
        self._source = source
        self._planned = source.steps_planned
        self._cadence = cadence
        self._checkpoint = checkpoint
        self._evaluate_model = evaluate
        self._observer = observer
        self._seed = seed
        self._loop = LoopState()
        self._saved_at = 0
        self._evaluation = Evaluation()
        self._evaluated_at = -1
        self._metrics: dict[str, float] = {}

    def restore(self) -> None:
        """Go back to the newest saved state, if there is one."""
        restored = self._checkpoint.restore(self._whole)
        if restored is not None:
            self._loop, source_state = restored
            self._source.load_state(source_state)
        self._saved_at = self._loop.steps_done
        gc.collect()
        gc.freeze()

    def has_unsaved(self) -> bool:
        """Tell whether more than the running step would be lost here; from any thread."""
        return self._saved_at != self._loop.steps_done or self._checkpoint.is_saving

    def run(self) -> Outcome:
        """Train to the end, or to a stop, which waits for the running step alone."""
        try:
            if not self._loop.is_judged:
                self._judge()
            while not self._is_at_end:
                self._step()
            if self._evaluate_model is not None and self._evaluated_at != self._loop.steps_done:
                self._evaluate()
        except Interrupted:
            self._leave()
        self._checkpoint.flush()
        drawn = self._source.drawn(self._loop.steps_done)
        return _outcome(self._loop, self._planned, self._evaluation, self._metrics, drawn)

    @property
    def _is_at_end(self) -> bool:
        return self._loop.steps_done >= self._planned or self._loop.rule is not None

    def _phase(self, name: str) -> None:
        self._observer.phase(name, step=self._loop.steps_done, steps_planned=self._planned)

    def _step(self) -> None:
        self._phase("train")
        self._checkpoint.check()
        step = run_step(self._phases, self._source, self._loop, self._observer, self._seed)
        self._loop, self._metrics = replace(step.loop, is_judged=False), step.metrics
        if self._loop.skipped_steps > self._cadence.max_skipped_steps:
            raise StageError(_skip_message(self._loop, self._cadence, step.sample_ids))
        self._observer.metrics(self._loop.steps_done, self._metrics)
        self._judge()
        done, can_save = self._loop.steps_done, self._source.can_save(self._loop.steps_done)
        if can_save and (self._is_at_end or done - self._saved_at >= self._cadence.save_every):
            self._save()
        if step.stop_requested and not self._is_at_end and (can_save or self._is_far_from_saving()):
            raise Interrupted
        if self._evaluate_model is not None and not self._is_at_end and done % self._cadence.evaluate_every == 0:
            self._evaluate()

    def _judge(self) -> None:
        """Ask the source whether a rule ends the stage, which may take rollouts."""
        rule = self._source.after_step(self._loop.steps_done, self._metrics)
        self._loop = replace(self._loop, rule=rule, is_judged=True)

    def _is_far_from_saving(self) -> bool:
        """Tell whether the steps to the next state that can be saved take longer than a stop waits; collective."""
        done, planned = self._loop.steps_done, self._planned
        steps = next(count for count in range(1, planned + 1) if self._source.can_save(done + count))
        step_s = distributed.all_sum([self._metrics["step_s"]])[0] / distributed.world_size()
        return steps * step_s > STOP_WAIT_S

    def _evaluate(self) -> None:
        assert self._evaluate_model is not None
        self._phase("evaluate")
        found = self._evaluate_model()
        named = {f"eval/{name}": value for name, value in found.finite().items()}
        for name, draw in self._source.drawn(self._loop.steps_done).items():
            named |= {f"{what}/{name}": value for what, value in asdict(draw).items()}
        self._observer.metrics(self._loop.steps_done, named)
        self._evaluation, self._evaluated_at = found, self._loop.steps_done

    def _save(self) -> None:
        self._phase("save")
        self._checkpoint.save(self._whole, self._loop, self._source.state())
        self._saved_at = self._loop.steps_done

    def _leave(self) -> NoReturn:
        """Save what is not saved yet, and raise Preempted; between two states that can be saved the first one stays."""
        done = self._loop.steps_done
        if self._saved_at != done and self._source.can_save(done):
            self._save()
        self._checkpoint.flush()
        kept = f"the state after {self._saved_at} is saved" if self._saved_at else "there is no state yet"
        raise Preempted(f"stopped after {done} of {self._planned} steps; {kept}")


def _outcome(
    loop: LoopState, planned: int, evaluation: Evaluation, metrics: dict[str, float], drawn: Mapping[str, Draw]
) -> Outcome:
    return Outcome(
        state="completed" if loop.rule is None else "stopped_by",
        rule=loop.rule,
        steps_done=loop.steps_done,
        steps_planned=planned,
        skipped_steps=loop.skipped_steps,
        samples=loop.samples,
        weight=loop.weight,
        evaluation=evaluation,
        last_metrics=metrics,
        drawn=drawn,
    )


def _skip_message(loop: LoopState, cadence: Cadence, sample_ids: list[int]) -> str:
    shown = ", ".join(str(row) for row in sample_ids[:32]) + (", ..." if len(sample_ids) > 32 else "")
    return (
        f"loss or gradient was not finite in {loop.skipped_steps} of {loop.steps_done} steps, which were skipped "
        f"(max_skipped_steps is {cadence.max_skipped_steps}); rows of the last one: {shown}"
    )
