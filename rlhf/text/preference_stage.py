"""The preference stage: a policy learns from judged answers, against its start or without, to a candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recipes.stages.preference import Preference
from recipes.stages.preference_losses import Kto
from rlhf.text.judged_rows import JudgedRows, open_judged_rows
from rlhf.text.policy import switch_dropout_off
from rlhf.text.preference_objective import AnswerLogprobs, PreferenceObjective, Referred, ranking, with_kl
from rlhf.text.reference import (
    EVALUATION,
    Asked,
    Prepare,
    Reference,
    ReferredBatches,
    ask_start,
    no_reference,
    saved_tables,
    training_rows,
)
from trainers.data.batches import BatchPlan, evaluation_batches
from trainers.data.order import drawn_rows
from trainers.engine.protocol import Engine
from trainers.evaluation.held_out import evaluate, per_source
from trainers.models.load import text_facts
from trainers.models.lora import add_adapter, start_names
from trainers.models.stack import load_trained
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.training.context import Candidate, StageContext, model_folder, model_weights
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import TrainingPlan, single_phase
from trainers.training.task import Course, run_training
from trainers.training.text_candidate import TrainedText, write_text_candidate

WRAPPER = "network."
"""Prefix that `AnswerLogprobs` gives to the network's parameter names."""


@dataclass(frozen=True)
class PreferenceTask:
    """Training of a policy on judged answers."""

    spec: Preference
    context: StageContext

    def open_data(self) -> JudgedRows:
        """Open the rows."""
        return open_judged_rows(self.spec, self.context)

    def build(self, data: JudgedRows) -> "PreferenceTrainee":
        """Load the start, with an adapter where one is trained."""
        spec, context = self.spec, self.context
        weights = model_weights(context, "init_from", spec.lora)
        network = load_trained(weights, "language_model", spec.lora, spec.shard, device=context.ranks.device)
        peft_config = None
        if spec.lora is not None:
            on = start_names(len(weights.adapters))
            peft_config = add_adapter(network, spec.lora, seed=stream_seed(context.seed, "adapter"), on=on)
        return PreferenceTrainee(spec, context, data, network, peft_config, weights.stack)


@dataclass(frozen=True)
class PreferenceTrainee:
    """A policy on its judged answers."""

    spec: Preference
    context: StageContext
    data: JudgedRows
    network: Any
    peft_config: Any
    stack: tuple[str, ...]
    """What an adapter lies on: the digests of the base and of the adapters on it."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.data.training.order(self.context.seed).epoch

    def course(self, training: TrainingPlan[Preference]) -> Course:
        """One engine; its policy is asked for the reference while it is its start. Collective."""
        module = AnswerLogprobs(self.network)
        switch_dropout_off(module)
        phase = single_phase(training, module, PreferenceObjective(self.spec.loss))
        plan = BatchPlan(self.data.training, self.context.seed, **training.share)
        references = self._references(phase.engine, plan, training) if self.spec.loss.has_reference else {}

        prepare: Prepare = list
        if isinstance(self.spec.loss, Kto):
            prepare = partial(with_kl, phase.engine)

        def measure() -> Evaluation:
            return self._evaluation(phase.engine, training, references.get(EVALUATION), prepare)

        return Course([phase], ReferredBatches(plan, training.steps, references, prepare), measure)

    def candidate(self, training: TrainingPlan[Preference], course: Course, outcome: Outcome) -> Candidate | None:
        """Write the policy; collective."""
        spec, data = self.spec, self.data
        return write_text_candidate(
            TrainedText(
                *("language_model", self.network, WRAPPER, data.tokenization),
                dtype_of(spec.shard.precision),
                self.peft_config,
                merge=spec.commits_merged,
                stack=self.stack,
            ),
            self.context,
            course.phases[0].engine,
            training.checkpoint,
            outcome,
            artifact="model" if self.peft_config is None else "adapter",
            metrics={
                **outcome.amounts(),
                "evaluation": {**outcome.evaluation.finite(), "held_out": data.held_out is not None},
                "data": data.training.report.to_json(),
            },
        )

    def _references(self, engine: Engine, plan: BatchPlan, training: TrainingPlan[Preference]) -> dict[str, Reference]:
        """What the start says of the rows that are trained on, and of those that are measured; collective."""
        measured, saved = self.data.measured, saved_tables(self.context)
        rows = self._measured_rows()
        batches = evaluation_batches(measured, len(rows), *self._share(training))
        return {
            asked.name: ask_start(engine, asked, saved, self.context.observer)
            for asked in (training_rows(plan, training.steps), Asked(EVALUATION, len(measured), rows, batches))
        }

    def _evaluation(
        self, engine: Engine, training: TrainingPlan[Preference], reference: Reference | None, prepare: Prepare
    ) -> Evaluation:
        """Measure held-out rows; collective."""
        spec, measured = self.spec, self.data.measured
        count = min(spec.train.evaluation_rows, len(measured))
        reference = reference or no_reference(len(measured))
        batches = [reference.refer(batch) for batch in evaluation_batches(measured, count, *self._share(training))]
        prepared = prepare(batches)

        def evaluated(batches: Sequence[Referred], count: int) -> dict[str, float]:
            shown = interruptible(batches, self.context.observer, "evaluate", count)
            return evaluate(engine.module, PreferenceObjective(spec.loss), shown, engine.device)

        def of_source(own: range, _: int) -> dict[str, float]:
            among = [row for row in self._measured_rows() if row in own]
            read = evaluation_batches(measured, len(among), *self._share(training), among)
            return evaluated(prepare([reference.refer(batch) for batch in read]), len(among)) if among else {}

        found = evaluated(prepared, count)
        found |= per_source(measured, count, of_source, ("loss", "accuracy"))
        reasons = []
        if isinstance(spec.loss, Kto) and (accuracy := ranking(engine, prepared)) is not None:
            found |= {"accuracy": accuracy, "margin": found["chosen_reward"] - found["rejected_reward"]}
        if "accuracy" not in found:
            reasons.append("held-out answers have one verdict alone, so that there is no accuracy")
        elif found["accuracy"] < spec.min_accuracy:
            measured_share = f"held-out accuracy {found['accuracy']:.3f}"
            reasons.append(f"{measured_share} is below min_accuracy {spec.min_accuracy}")
        return Evaluation(found, gate_reasons=tuple(reasons))

    def _measured_rows(self) -> list[int]:
        """The rows that evaluations read."""
        measured = self.data.measured
        return drawn_rows(measured.digest, 0, self.spec.train.evaluation_rows, len(measured))

    def _share(self, training: TrainingPlan[Preference]) -> tuple[int, int, int]:
        """Workers, this rank, and rows of a micro-batch."""
        return training.layout.workers, self.context.ranks.rank, training.layout.micro_batch


def run_preference(spec: Preference, context: StageContext) -> Candidate | None:
    """Train a policy on judged answers; the candidate comes from rank 0. Collective."""
    spec.check_model(text_facts(model_folder(context, "init_from")))
    return run_training(PreferenceTask(spec, context))
