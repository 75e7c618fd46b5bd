"""A stage that tunes a language model: prompts, models, rollouts and reward, and the artifact of actor and critic."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.artifact_kinds import ArtifactKind
from recipes.stages.environments import TERM
from recipes.stages.rewards.union import weights_of
from recipes.stages.rl import RlText
from recipes.stages.rollout_engines import LocalEngine, VllmEngine
from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.environments.open import open_environment
from rlhf.iterations import RlOutcome
from rlhf.monitors import kept_iterations
from rlhf.policy import Learner
from rlhf.rewards.terms import open_text_terms
from rlhf.text.build_policy import ACTOR, POLICY, RewardSource, SharedModels, build_models, network_tensors
from rlhf.text.critic import Critic
from rlhf.text.episodes import Episodes, Observer
from rlhf.text.judge_model import open_judges
from rlhf.text.policy import PolicyModels
from rlhf.text.probe import Probe, Table, require_truth
from rlhf.text.reward_inputs import Reading, reading_of
from rlhf.text.rewards import JudgeTerm, TextReward
from rlhf.text.samples import Sample, pack
from rlhf.text.sampling import Show, TextPolicy, TextSources
from rlhf.text.served import ServedActor
from trainers.checkpoint.checkpoint import StoreCheckpoint, conditions
from trainers.data.batches import BatchPlan
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.inference.generation import sampling_settings
from trainers.inference.rollouts import LocalRollouts, RolloutEngine
from trainers.inference.vllm_rollouts import Limits, VllmRollouts
from trainers.models.folders import model_config
from trainers.models.load import longest_input, text_facts
from trainers.runtime.precision import dtype_of
from trainers.store.manifest import ArtifactManifest, Layout, RolloutsManifest
from trainers.training.candidate import upload_candidate
from trainers.training.context import (
    Candidate,
    Check,
    StageContext,
    check_tokenizers,
    model_folder,
    model_weights,
    open_dataset,
    put_probe,
    text_request,
)
from trainers.training.text_candidate import TrainedText, write_trained

KEPT_SAMPLES = 4


@dataclass(frozen=True)
class TextData:
    """What the policy reads."""

    tokenization: Tokenization
    prompts: Dataset
    text: Dataset | None
    """Text that is mixed into the updates."""


@dataclass(frozen=True)
class TextRl:
    """Responses to prompts, scored by a reward."""

    spec: RlText
    context: StageContext
    closing: ExitStack = field(default_factory=ExitStack)
    """Closes what was opened outside of the worker, at the end of the stage."""

    def open_data(self) -> TextData:
        """Open prompts and text; raises RequestError or StageError for models that do not fit."""
        spec, context = self.spec, self.context
        spec.check_model(text_facts(model_folder(context, "actor")))
        tokenization = load_tokenization(model_folder(context, "actor"))
        check_tokenizers(spec, context)
        asked, mixed_in = spec.get_source("prompts"), spec.find_source("text")
        request = text_request(context, asked, tokenization, spec.rollout.max_prompt_tokens, spec.template)
        prompts = open_dataset(context, request)
        text = None
        if mixed_in is not None:
            text = open_dataset(context, text_request(context, mixed_in, tokenization, spec.algorithm.text_length))
        return TextData(tokenization, prompts, text)

    def build(self, data: TextData) -> "TextModels":
        """Load the models, a reward model and a critic where there are any; open the other terms of the reward."""
        spec, context = self.spec, self.context
        actor, source, reading = model_weights(context, "actor", spec.lora), None, None
        judges: list[JudgeTerm] = []
        if spec.judge is not None:
            name, term = spec.judge
            place = f"rewards.{name}.model"
            source, reading = reward_source(context, place), reading_by(context, place, data.prompts, data.tokenization)
            judges.append(JudgeTerm(name, source.statistics, term.clip))
        own = {} if spec.environment is None else {TERM: spec.environment.weight}
        reward = TextReward(
            weights=weights_of(spec.rewards) | own,
            judges=judges,
            terms=open_text_terms(spec.rewards, context.base_dir, data.prompts.records, open_judges(spec, context)),
            records=data.prompts.records,
            decode=partial(data.tokenization.decode, skip_special=True),
        )
        shared = build_models(
            spec,
            actor,
            source,
            reading=reading,
            num_tokens=data.tokenization.vocab_size,
            seed=context.seed,
            device=context.ranks.device,
        )
        probe = self._probe(data, shared, reward)
        return TextModels(spec, context, self.closing, data, shared, reward, actor.stack, probe)

    def _probe(self, data: TextData, shared: SharedModels, reward: TextReward) -> Table:
        """What the reward says of answers whose worth is known; raises StageError where it prefers noise."""
        spec, context = self.spec, self.context
        if spec.probe == "off":
            return {}
        longest = spec.rollout.max_new_tokens
        texts_alone = replace(reward, weights={name: reward.weights[name] for name in spec.rewards})
        table = Probe(texts_alone, spec.rewards, shared.models, data.tokenization, longest, context.seed).table()
        if (finding := require_truth(table, spec.probe)) is not None:
            context.observer.notify(f"warning: {finding}")
        return table


@dataclass(frozen=True)
class TextModels:
    """The models of a stage that tunes a language model."""

    spec: RlText
    context: StageContext
    closing: ExitStack
    data: TextData
    shared: SharedModels
    reward: TextReward
    stack: tuple[str, ...]
    """What the actor was opened from, by digest."""
    probe: Table
    """What the reward said of answers whose worth is known."""

    @property
    def module(self) -> PolicyModels:
        """All of them."""
        return self.shared.models

    @property
    def groups(self) -> list[ParameterGroup]:
        """The actor's parameters, and the critic's where there is one."""
        adamw, shared = self.spec.algorithm.optimizer, self.shared
        learning = {"actor": shared.actor_parameters, "critic": shared.critic_parameters}
        return [
            ParameterGroup(name, parameters, adamw.betas, adamw.eps, adamw.weight_decay)
            for name, parameters in learning.items()
            if parameters
        ]

    def policy(self, learner: Learner) -> TextPolicy:
        """Responses from the engine that the context opens."""
        spec, context, data, rollout = self.spec, self.context, self.data, self.spec.rollout
        ranks, per_iteration, per_step = context.ranks, rollout.prompts_per_iteration, spec.algorithm.text_batch

        def plan(rows: Dataset, size: int) -> BatchPlan:
            """A rank's share is one micro-batch."""
            return BatchPlan(rows, context.seed, size, ranks.world_size, ranks.rank, size // ranks.world_size)

        text = None if data.text is None else plan(data.text, per_step)
        return TextPolicy(
            learner,
            self._rollouts(learner),
            TextSources(plan(data.prompts, per_iteration), text),
            spec.algorithm,
            rollout,
            sampling_settings(data.tokenization, rollout.max_new_tokens, rollout.temperature, rollout.stop_tokens),
            self.reward,
            self._listeners(learner) if ranks.rank == 0 else (),
            self._episodes(),
        )

    def _episodes(self) -> Episodes | None:
        """Conversations with the stage's environment, where it has one."""
        environment, data = self.spec.environment, self.data
        if environment is None:
            return None
        observer = Observer(data.tokenization, environment.role, environment.max_observation_tokens)
        make = open_environment(environment, self.context.base_dir)
        return Episodes(environment, make, observer, data.prompts.records)

    def _listeners(self, learner: Learner) -> list[Show]:
        """What an iteration's samples are passed to on rank 0: the run's report, and the store where they are kept."""
        spec, context = self.spec, self.context
        kept = [] if spec.rollout.keep == "none" else [rollout_keeper(spec, context, learner)]
        return [sample_writer(spec, context, self.data.tokenization), *kept]

    def _rollouts(self, learner: Learner) -> RolloutEngine:
        """What the recipe has answer the prompts."""
        spec, context, trained = self.spec, self.context, self._trained()
        match spec.rollout.engine:
            case LocalEngine():
                return LocalRollouts(learner.engine, context.seed)
            case VllmEngine() as settings:
                adapters = trained.adapters if spec.lora is not None else ()
                sends_adapter = settings.sends_adapter(spec.lora) and len(adapters) == 1
                served = ServedActor(
                    learner.engine, trained.model, trained.dtype, adapters, trained.peft_config, sends_adapter
                )
                longest = spec.rollout.max_prompt_tokens + spec.response_tokens
                limits = Limits(str(trained.dtype).removeprefix("torch."), longest, torch.get_num_threads())
                rollouts = VllmRollouts(learner.engine, served, settings, limits, context.seed, context.observer)
                self.closing.callback(rollouts.close)
                return rollouts

    def candidate(self, engine: Engine, checkpoint: StoreCheckpoint, outcome: RlOutcome) -> Candidate | None:
        """Write, probe and upload the actor, and the critic where there is one; collective."""
        trained, tokenization, is_first = self._trained(), self.data.tokenization, self.context.ranks.rank == 0
        tensors = dict(engine.full_parameters())
        policy = network_tensors(tensors, POLICY)
        whole = trained.whole_tensors(policy) if is_first else {}
        critic = Critic(self.module, tensors) if is_first and self.has_critic else None
        probes = critic_probe = None
        with engine.gathered():
            if is_first:
                probes = trained.probes(whole)
                critic_probe = None if critic is None else critic.probe()
        if probes is None:
            return None
        found = probes

        def write(folder: Path) -> list[Check]:
            checks = write_trained(folder, trained, policy, whole, self.context, found)
            if critic is None or critic_probe is None:
                return checks
            critic.write(folder / "critic", tokenization, trained.dtype)
            return [Check("value_model", "critic", put_probe(self.context.store, critic_probe)), *checks]

        return upload_candidate(
            self._kind,
            write,
            self.context,
            checkpoint,
            outcome.outcome,
            metrics={
                **outcome.metrics,
                **({"probe": {**self.probe, "start": self._start(outcome.start)}} if self.probe else {}),
                "response_tokens": int(outcome.outcome.weight),
                "data": self.data.prompts.report.to_json(),
            },
            gate_reasons=outcome.gate_reasons,
            architecture=model_config(trained.model.config, "language_model", trained.dtype),
            contract=tokenization.contract_hash,
            base=trained.base(self.context),
            stack=trained.lower_stack,
            quantized=trained.quantized,
        )

    def _start(self, report: Mapping[str, float]) -> dict[str, float]:
        """The first iteration's answers in the probe's terms; their score pays for missing end tokens."""
        means = {name: report[f"reward/{name}"] for name in self.reward.weights}
        return {**means, "score": report["shaped_score_mean"]}

    @property
    def has_critic(self) -> bool:
        """Whether a critic learns next to the actor."""
        return self.spec.algorithm.value_model is not None

    @property
    def _kind(self) -> ArtifactKind:
        """What holds them: an actor alone is what a fine-tuning makes."""
        if self.has_critic:
            return "actor_critic"
        return "model" if self.spec.lora is None else "adapter"

    def _trained(self) -> TrainedText:
        """The actor with what its files need."""
        return TrainedText(
            "language_model",
            self.module.networks[POLICY],
            f"networks.{POLICY}.",
            self.data.tokenization,
            dtype_of(self.spec.shard.precision),
            self.shared.peft_config,
            merge=self.spec.merge,
            start="actor",
            part="actor" if self.has_critic else "model",
            adapter=ACTOR,
            stack=self.stack,
        )


def reading_by(context: StageContext, field_path: str, prompts: Dataset, writer: Tokenization) -> Reading:
    """How the reward model of an input reads responses to these prompts."""
    folder = model_folder(context, field_path)
    return reading_of(prompts, writer, load_tokenization(folder), longest_input(folder))


def reward_source(context: StageContext, field_path: str) -> RewardSource:
    """What a reward model is opened from."""
    manifest = context.inputs[field_path]
    has_adapter = any(name.startswith("adapter/") for name in manifest.files)
    return RewardSource(
        weights=model_weights(context, field_path),
        adapter=context.store.folder(manifest, "adapter") if has_adapter else None,
        lies_on=manifest.lies_on,
        statistics=score_statistics(manifest),
    )


def score_statistics(manifest: ArtifactManifest) -> ScoreStatistics:
    """Mean and standard deviation that the reward stage stored; an imported model without them keeps its raw scale."""
    scores: Any = manifest.metrics.get("scores")
    if scores is None:
        return ScoreStatistics(0.0, 1.0)
    return ScoreStatistics(float(scores["mean"]), float(scores["std"]))


def sample_writer(spec: RlText, context: StageContext, tokenization: Tokenization) -> Show:
    """Keep a few responses of some iterations, the first and the last among them, in the run's folder."""
    writer = context.samples()
    steps = spec.algorithm.steps_per_iteration
    kept = kept_iterations(spec.algorithm.iterations)

    def show(iteration: int, samples: Sequence[Sample], scores: Sequence[float]) -> None:
        if iteration not in kept:
            return
        for sample, score in list(zip(samples, scores, strict=True))[:KEPT_SAMPLES]:
            prompt = tokenization.decode(sample.tokens[~sample.actions])
            line = {"prompt": prompt, "response": tokenization.decode(sample.action_ids), "score": score}
            writer.append({"step": iteration * steps, **line, "rewards": dict(sample.rewards)})
        writer.flush()

    return show


def rollout_keeper(spec: RlText, context: StageContext, learner: Learner) -> Show:
    """Keep the samples of every iteration in the store, as long as the recipe says."""
    store, run, stage, keep = context.store, context.run, context.stage, spec.rollout.keep
    steps = spec.algorithm.steps_per_iteration

    def show(iteration: int, samples: Sequence[Sample], scores: Sequence[float]) -> None:
        manifest = RolloutsManifest(
            run=run,
            stage=stage,
            fingerprint=context.fingerprint,
            iteration=iteration,
            step=iteration * steps,
            files={"samples.safetensors": store.objects.put_chunks([pack(samples)])},
            layout=Layout(workers=context.ranks.world_size, micro_batch=learner.micro_batch, accumulation=1),
            values={"samples": len(samples), **conditions(learner.engine)},
        )
        store.put_rollouts(manifest, context.lease)
        if isinstance(keep, int):
            store.drop_rollouts(run, stage, before=iteration + 1 - keep)

    return show
