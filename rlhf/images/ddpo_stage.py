"""The PPO stage of images: actor, reward and experience around the one loop, and the tuned diffusion as a candidate."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recipes.errors import RequestError, StageError, raise_findings
from recipes.stages.ddpo import ActorFacts, ClassReward, ImageRollout, RuleReward
from recipes.stages.rl import PpoImages
from rlhf.images.conditions import ImagePrompts, open_prompts
from rlhf.images.ddpo import ColocatedImages, DdpoEstimator, DdpoObjective, ImageRollouts, Show
from rlhf.images.policy import ImageModels
from rlhf.images.rewards import ImageScorer, classifier_scorer, rule_scorer
from rlhf.iterations import PpoSource, kept_iterations, run_iterations
from trainers.engine.build import build_engine, parameter_group
from trainers.inference.image_grid import grid_sample
from trainers.models.images.build import Blueprint, open_family
from trainers.models.images.classifier import ClassifierFamily
from trainers.models.images.ddpm import DdpmFamily
from trainers.models.lora import adapter_tensors, merged_tensors
from trainers.runtime.precision import dtype_of, unit_roundoff, use_fast_matmul
from trainers.runtime.randomness import stream_seed
from trainers.store.manifest import Layout
from trainers.tasks.image_start import adapt
from trainers.training.context import Candidate, StageContext, model_folder
from trainers.training.image_candidate import write_image_candidate
from trainers.training.steps import one_group, stage_layout

GROUP = "actor"
ACTOR = "networks.actor."
"""What the names of the trained parameters start with."""


def run_ddpo(spec: PpoImages, context: StageContext) -> Candidate | None:
    """Tune a diffusion against a reward; the candidate comes from rank 0. Collective."""
    ranks, observer, settings, rollout = context.ranks, context.observer, spec.ppo, spec.rollout
    use_fast_matmul(ranks.device)
    layout = _layout(spec, context)

    observer.phase("model")
    actor = open_family(model_folder(context, "actor"), device=ranks.device)
    assert isinstance(actor, DdpmFamily)
    raise_findings(spec.actor_rules(ActorFacts(actor.settings, actor.is_captioned, actor.facts.classes)))
    blueprint = _policy_of(actor, rollout)
    prompts = open_prompts(spec, context, actor)
    score = _scorer(spec, context, actor, prompts)
    models, peft_config = _models(spec, context, blueprint, actor)
    group = parameter_group(GROUP, models, settings.optimizer, prefix=ACTOR)
    engine = build_engine(models, [group], spec.shard, clip=settings.gradient_clipping, device=ranks.device)
    trained = [name for name, _ in group.parameters]
    roundoff = unit_roundoff(spec.shard.precision, ranks.device)
    estimator = DdpoEstimator(
        engine=engine,
        rollouts=ColocatedImages(engine),
        score=score,
        settings=settings,
        images=rollout.images_per_iteration,
        prompts=prompts,
        seed=context.seed,
        rank=ranks.rank,
        workers=ranks.world_size,
        micro_batch=layout.micro_batch,
        roundoff=roundoff,
        observer=observer,
        show=_grid_writer(spec, context, prompts) if settings.grid else None,
    )
    source = PpoSource(
        estimator, engine=engine, settings=settings, trained=trained, seed=context.seed, observer=observer
    )
    checkpoint = context.checkpoint(layout)
    objective = DdpoObjective(settings, roundoff)
    rates = one_group(settings.optimizer.lr, settings.schedule, source.steps_planned, GROUP)
    tuned = run_iterations(objective, source, context, checkpoint, rates)
    start, metrics = source.start(), dict(tuned.metrics)
    if start["score_std"] > 0:
        metrics["score_gain_sd"] = (tuned.final.score_mean - start["score_mean"]) / start["score_std"]
    tensors: dict[str, Tensor] = {
        name.removeprefix(ACTOR): tensor.clone() for name, tensor in engine.full_parameters() if name.startswith(ACTOR)
    }
    whole = tensors if peft_config is None else merged_tensors(models.networks["actor"], tensors)
    candidate = write_image_candidate(
        blueprint,
        {f"net.{name}": tensor for name, tensor in whole.items()},
        context,
        checkpoint,
        tuned.outcome,
        dtype=dtype_of(spec.shard.precision),
        metrics=metrics,
        gate_reasons=tuned.gate_reasons,
        peft_config=peft_config,
        adapter=None if peft_config is None else adapter_tensors(tensors),
        base_input="actor",
    )
    engine.close()
    return candidate


def _policy_of(actor: DdpmFamily, rollout: ImageRollout) -> Blueprint:
    """The actor as it is tuned, and as it draws afterwards: by the ancestral sampler."""
    changes: dict[str, Any] = {"sampler": "ddpm"}
    if rollout.steps is not None:
        changes["sampling_steps"] = rollout.steps
    if rollout.guidance is not None:
        changes["guidance"] = rollout.guidance
    settings = actor.settings.model_copy(update=changes)
    return Blueprint(settings, actor.facts, actor.codec, actor.text)


def _models(spec: PpoImages, context: StageContext, blueprint: Blueprint, actor: DdpmFamily) -> tuple[ImageModels, Any]:
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


def _scorer(spec: PpoImages, context: StageContext, actor: DdpmFamily, prompts: ImagePrompts) -> ImageScorer:
    """What rewards the images; equal on every rank."""
    match spec.reward:
        case RuleReward() as rule:
            return rule_scorer(rule)
        case ClassReward() as reward:
            if reward.label is None and not prompts.classes:
                raise RequestError("reward.label: the captions' images have no labels; name the rewarded class")
            judge = open_family(model_folder(context, "reward.classifier"), device=context.ranks.device)
            assert isinstance(judge, ClassifierFamily)
            raise_findings(spec.judge_rules(judge.facts.classes, prompts.classes))
            return classifier_scorer(reward, judge, replace(actor.facts, classes=prompts.classes))


def _layout(spec: PpoImages, context: StageContext) -> Layout:
    """Micro-batch and accumulation of a mini-batch; raises StageError where the numbers do not divide."""
    batch = spec.batch()
    raise_findings(batch.rules(context.ranks.world_size), StageError)
    return stage_layout(context, batch.size, spec.shard.micro_batch, at_most=spec.largest_micro_batch)


def _grid_writer(spec: PpoImages, context: StageContext, prompts: ImagePrompts) -> Show:
    """Keep images at the same seeds in some iterations, the first and the last among them, in the run's folder."""
    steps, count = spec.ppo.steps_per_iteration, spec.ppo.grid
    kept = kept_iterations(spec.ppo.iterations)
    seeds = [stream_seed(context.seed, "grid", number) for number in range(count)]
    asked = prompts.shown(count)
    writer = None
    if context.ranks.rank == 0:
        writer = context.samples()

    def show(iteration: int, rollouts: ImageRollouts) -> None:
        if iteration not in kept:
            return
        images = rollouts.draw(seeds, asked, range(count)).images_BCHW
        if writer is not None:
            writer.append(grid_sample(images.cpu(), prompts.columns, iteration * steps))
            writer.flush()

    return show
