"""A stage that tunes a diffusion: what is asked for, actor and start, reward, and the tuned model as an artifact."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipes.errors import raise_findings
from recipes.stages.ddpo import ActorFacts, ClassReward, ImageRollout, RuleReward
from recipes.stages.rl_images import RlImages
from rlhf.images.conditions import ImagePrompts, open_prompts
from rlhf.images.policy import ImageModels
from rlhf.images.rewards import ImageScorer, classifier_scorer, rule_scorer
from rlhf.images.sampling import ImagePolicy, Show
from rlhf.iterations import RlOutcome
from rlhf.monitors import kept_iterations
from rlhf.policy import Learner
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.engine.build import parameter_group
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.inference.image_grid import grid_sample
from trainers.models.images.build import Blueprint, open_family
from trainers.models.images.classifier import ClassifierFamily
from trainers.models.images.ddpm import DdpmFamily
from trainers.models.lora import adapter_tensors
from trainers.models.merged_adapters import merged_tensors
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.tasks.image_start import adapt
from trainers.training.context import Candidate, StageContext, model_folder
from trainers.training.image_candidate import write_image_candidate

GROUP = "actor"
ACTOR = "networks.actor."
"""What the names of the trained parameters start with."""


@dataclass(frozen=True)
class ImageRlData:
    """The actor as it starts, and what it is asked for."""

    actor: DdpmFamily
    prompts: ImagePrompts


@dataclass(frozen=True)
class ImageRl:
    """Images of classes or captions, scored by a rule or a classifier."""

    spec: RlImages
    context: StageContext

    def open_data(self) -> ImageRlData:
        """Open the actor and what it is asked for; raises RequestError for an actor that does not fit."""
        spec, context = self.spec, self.context
        actor = open_family(model_folder(context, "actor"), device=context.ranks.device)
        assert isinstance(actor, DdpmFamily)
        raise_findings(spec.actor_rules(ActorFacts(actor.settings, actor.is_captioned, actor.facts.classes)))
        return ImageRlData(actor, open_prompts(spec, context, actor))

    def build(self, data: ImageRlData) -> "ImageRlModels":
        """Build policy and frozen start, and open what rewards."""
        spec, context = self.spec, self.context
        score = _scorer(spec, context, data.actor, data.prompts)
        blueprint = _policy_of(data.actor, spec.rollout)
        module, peft_config = _models(spec, context, blueprint, data.actor)
        return ImageRlModels(spec, context, data.prompts, score, blueprint, module, peft_config)


@dataclass(frozen=True)
class ImageRlModels:
    """The models of a stage that tunes a diffusion."""

    spec: RlImages
    context: StageContext
    prompts: ImagePrompts
    score: ImageScorer
    blueprint: Blueprint
    module: ImageModels
    peft_config: Any

    @property
    def groups(self) -> list[ParameterGroup]:
        """The actor's parameters."""
        return [parameter_group(GROUP, self.module, self.spec.algorithm.optimizer, prefix=ACTOR)]

    def policy(self, learner: Learner) -> ImagePolicy:
        """Images from the learner's own parameters."""
        spec = self.spec
        show = _grid_writer(spec, self.context, self.prompts) if spec.algorithm.grid else None
        return ImagePolicy(learner, spec.rollout.images_per_iteration, self.prompts, self.score, show)

    def candidate(self, engine: Engine, checkpoint: StoreCheckpoint, outcome: RlOutcome) -> Candidate | None:
        """Write the tuned diffusion; collective."""
        start, metrics = outcome.start, dict(outcome.metrics)
        if start["score_std"] > 0:
            metrics["score_gain_sd"] = (outcome.final.score_mean - start["score_mean"]) / start["score_std"]
        tensors: dict[str, Tensor] = {
            name.removeprefix(ACTOR): tensor.clone()
            for name, tensor in engine.full_parameters()
            if name.startswith(ACTOR)
        }
        is_adapted = self.peft_config is not None
        whole = merged_tensors(self.module.networks["actor"], tensors) if is_adapted else tensors
        return write_image_candidate(
            self.blueprint,
            {f"net.{name}": tensor for name, tensor in whole.items()},
            self.context,
            checkpoint,
            outcome.outcome,
            dtype=dtype_of(self.spec.shard.precision),
            metrics=metrics,
            gate_reasons=outcome.gate_reasons,
            peft_config=self.peft_config,
            adapter=adapter_tensors(tensors) if is_adapted else None,
            base_input="actor",
        )


def _policy_of(actor: DdpmFamily, rollout: ImageRollout) -> Blueprint:
    """The actor as it is tuned, and as it draws afterwards: by the ancestral sampler."""
    changes: dict[str, Any] = {"sampler": "ddpm"}
    if rollout.steps is not None:
        changes["sampling_steps"] = rollout.steps
    if rollout.guidance is not None:
        changes["guidance"] = rollout.guidance
    settings = actor.settings.model_copy(update=changes)
    return Blueprint(settings, actor.facts, actor.codec, actor.text)


def _models(spec: RlImages, context: StageContext, blueprint: Blueprint, actor: DdpmFamily) -> tuple[ImageModels, Any]:
    """Policy and frozen start; with LoRA one network, whose adapters have the configuration that is returned too."""
    policy = _copy(blueprint, actor)
    if spec.lora is None:
        return ImageModels(policy, _copy(blueprint, actor), spec.rollout.min_sd), None
    config = adapt(policy, spec.lora, stream_seed(context.seed, "adapter"))
    return ImageModels(policy, None, spec.rollout.min_sd), config


def _copy(blueprint: Blueprint, actor: DdpmFamily) -> DdpmFamily:
    """The actor's network once more, in fp32."""
    weights = {name: parameter.detach().float() for name, parameter in actor.module.named_parameters()}
    family = blueprint.with_weights(weights, torch.float32)
    assert isinstance(family, DdpmFamily)
    return family


def _scorer(spec: RlImages, context: StageContext, actor: DdpmFamily, prompts: ImagePrompts) -> ImageScorer:
    """What rewards the images; equal on every rank."""
    match spec.reward:
        case RuleReward() as rule:
            return rule_scorer(rule)
        case ClassReward() as reward:
            raise_findings(spec.label_rules(has_labels=bool(prompts.classes)))
            judge = open_family(model_folder(context, "reward.classifier"), device=context.ranks.device)
            assert isinstance(judge, ClassifierFamily)
            raise_findings(spec.judge_rules(judge.facts.classes, prompts.classes))
            return classifier_scorer(reward, judge, replace(actor.facts, classes=prompts.classes))


def _grid_writer(spec: RlImages, context: StageContext, prompts: ImagePrompts) -> Show:
    """Keep images at the same seeds in some iterations, the first and the last among them, in the run's folder."""
    steps, count = spec.algorithm.steps_per_iteration, spec.algorithm.grid
    kept = kept_iterations(spec.algorithm.iterations)
    seeds = [stream_seed(context.seed, "grid", number) for number in range(count)]
    asked = prompts.shown(count)
    writer = None
    if context.ranks.rank == 0:
        writer = context.samples()

    def show(iteration: int, policy: ImagePolicy) -> None:
        if iteration not in kept:
            return
        images = policy.draw(seeds, asked, range(count)).images_BCHW
        if writer is not None:
            writer.append(grid_sample(images.cpu(), prompts.columns, iteration * steps))
            writer.flush()

    return show
