"""The PPO stage: models, rollouts and experience around the one loop, and the candidate of actor and critic."""

from functools import partial
from typing import Any

from torch import Tensor

from recipes.errors import StageError, raise_findings
from recipes.stages.answers import TextFacts
from recipes.stages.ppo import Rollout
from recipes.stages.rl import PpoStage
from rlhf.algorithms.advantages import Gae
from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.experience import Responses
from rlhf.iterations import PpoSource, Tuned, kept_iterations, run_iterations
from rlhf.text.build_policy import ACTOR, POLICY, RewardSource, SharedModels, build_models, network_tensors
from rlhf.text.critic import Critic
from rlhf.text.ppo import PpoObjective, ResponseExperience, Show
from rlhf.text.reward_inputs import Reading, reading_of
from rlhf.text.rollout import ColocatedRollouts
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.data.batches import BatchPlan
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.engine.build import build_engine
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.inference.generation import SamplingSettings, sampling_settings
from trainers.models.folders import model_config
from trainers.models.load import longest_input, model_family
from trainers.runtime.precision import dtype_of, unit_roundoff, use_fast_matmul
from trainers.store.manifest import ArtifactManifest, FileEntry, Layout
from trainers.training.context import (
    Candidate,
    Check,
    StageContext,
    candidate_folder,
    check_tokenizers,
    data_request,
    model_folder,
    model_weights,
    open_dataset,
    put_probe,
)
from trainers.training.schedule import learning_rate_factor
from trainers.training.steps import stage_layout
from trainers.training.text_candidate import TrainedText, write_trained

KEPT_SAMPLES = 4


def run_ppo(spec: PpoStage, context: StageContext) -> Candidate | None:
    """Optimise a policy against a reward model; the candidate comes from rank 0. Collective."""
    ranks, observer, settings, rollout = context.ranks, context.observer, spec.ppo, spec.rollout
    observer.phase("data")
    use_fast_matmul(ranks.device)
    spec.check_model(TextFacts(model_family(model_folder(context, "actor"))))
    tokenization = load_tokenization(model_folder(context, "actor"))
    check_tokenizers(spec, context)
    prompts = open_dataset(
        context,
        data_request(context, spec.get_source("prompts"), tokenization, rollout.max_prompt_tokens, spec.template),
    )
    text = _text_plan(spec, context, tokenization)
    layout = _layout(spec, context)

    observer.phase("model")
    actor, reward = model_weights(context, "actor", spec.lora), reward_source(context, "reward")
    shared = build_models(
        spec,
        actor,
        reward,
        reading=reading_by(context, "reward", prompts, tokenization),
        num_tokens=tokenization.vocab_size,
        seed=context.seed,
        device=ranks.device,
    )
    engine = build_engine(
        shared.models, _groups(spec, shared), spec.shard, clip=settings.gradient_clipping, device=ranks.device
    )
    sampling = _sampling(rollout, tokenization)
    roundoff = unit_roundoff(spec.shard.precision, ranks.device)
    per_iteration = rollout.prompts_per_iteration
    estimator = ResponseExperience(
        engine=engine,
        rollouts=ColocatedRollouts(engine, sampling, context.seed),
        prompts=BatchPlan(
            prompts, context.seed, per_iteration, ranks.world_size, ranks.rank, per_iteration // ranks.world_size
        ),
        settings=settings,
        rollout=rollout,
        statistics=reward.statistics,
        credit=Gae(settings.gamma, settings.lam),
        micro_batch=layout.micro_batch,
        roundoff=roundoff,
        observer=observer,
        text=text,
        show=_sample_writer(spec, context, tokenization) if ranks.rank == 0 else None,
    )
    source = PpoSource(
        estimator, engine=engine, settings=settings, trained=shared.trained, seed=context.seed, observer=observer
    )
    checkpoint = context.checkpoint(layout)
    objective = PpoObjective(settings, rollout.max_new_tokens, roundoff)
    rates = partial(_learning_rates, spec, source)
    tuned = run_iterations(objective, source, context, checkpoint, rates)
    candidate = _write_candidate(spec, context, engine, shared, actor.stack, tokenization, tuned, prompts, checkpoint)
    engine.close()
    return candidate


def reading_by(context: StageContext, field_path: str, prompts: Dataset, writer: Tokenization) -> Reading:
    """How the reward model of an input reads responses to these prompts."""
    folder = model_folder(context, field_path)
    return reading_of(prompts, writer, load_tokenization(folder), longest_input(folder))


def reward_source(context: StageContext, field_path: str) -> RewardSource:
    """What an input's reward model is opened from, and how its scores are normalised."""
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


def _sampling(rollout: Rollout, tokenization: Tokenization) -> SamplingSettings:
    """How responses are drawn, and what ends them."""
    return sampling_settings(tokenization, rollout.max_new_tokens, rollout.temperature, rollout.stop_tokens)


def _text_plan(spec: PpoStage, context: StageContext, tokenization: Tokenization) -> BatchPlan | None:
    """The text that is mixed into every step, a rank's share one micro-batch; None: there is none. Collective."""
    mixed_in = spec.find_source("text")
    if mixed_in is None:
        return None
    text = open_dataset(context, data_request(context, mixed_in, tokenization, spec.ppo.text_length))
    workers, rows = context.ranks.world_size, spec.ppo.text_batch
    return BatchPlan(text, context.seed, rows, workers, context.ranks.rank, rows // workers)


def _layout(spec: PpoStage, context: StageContext) -> Layout:
    """Micro-batch and accumulation of a mini-batch; raises StageError where the numbers do not divide."""
    batch = spec.batch()
    raise_findings(batch.rules(context.ranks.world_size), StageError)
    return stage_layout(context, batch.size, spec.shard.micro_batch)


def _groups(spec: PpoStage, shared: SharedModels) -> list[ParameterGroup]:
    adamw = spec.ppo.optimizer
    return [
        ParameterGroup(name, parameters, adamw.betas, adamw.eps, adamw.weight_decay)
        for name, parameters in (("actor", shared.actor_parameters), ("critic", shared.critic_parameters))
    ]


def _learning_rates(spec: PpoStage, source: PpoSource[Any], step: int) -> dict[str, float]:
    factor = learning_rate_factor(spec.ppo.schedule, step, source.steps_planned)
    is_warming_up = step < spec.ppo.critic_warmup * source.steps_per_iteration
    actor, critic = spec.ppo.optimizer.lr, spec.ppo.critic_lr
    return {
        "actor": 0.0 if is_warming_up else actor * factor,
        "critic": (actor if critic is None else critic) * factor,
    }


def _sample_writer(spec: PpoStage, context: StageContext, tokenization: Tokenization) -> Show:
    """Keep a few responses of some iterations, the first and the last among them, in the run's folder."""
    writer = context.samples()
    steps = spec.ppo.steps_per_iteration
    kept = kept_iterations(spec.ppo.iterations)

    def show(iteration: int, responses: Responses, scores: Tensor) -> None:
        if iteration not in kept:
            return
        shown = responses.rows(range(min(KEPT_SAMPLES, len(responses.sample_ids_B))))
        for row, tokens in enumerate(shown.response_ids):
            is_prompt = shown.attention_mask_BT[row] & ~shown.response_mask_BT[row]
            prompt = tokenization.decode(shown.input_ids_BT[row][is_prompt].tolist())
            line = {"prompt": prompt, "response": tokenization.decode(tokens), "score": float(scores[row])}
            writer.append({"step": iteration * steps, **line})
        writer.flush()

    return show


def _write_candidate(
    spec: PpoStage,
    context: StageContext,
    engine: Engine,
    shared: SharedModels,
    stack: tuple[str, ...],
    tokenization: Tokenization,
    tuned: Tuned,
    prompts: Dataset,
    checkpoint: StoreCheckpoint,
) -> Candidate | None:
    """Write, probe and upload actor and critic; the candidate comes from rank 0. Collective."""
    dtype = dtype_of(spec.shard.precision)
    models, is_first = shared.models, context.ranks.rank == 0
    trained = TrainedText(
        "language_model",
        models.networks[POLICY],
        f"networks.{POLICY}.",
        tokenization,
        dtype,
        shared.peft_config,
        merge=spec.merge,
        start="actor",
        part="actor",
        adapter=ACTOR,
        stack=stack,
    )
    tensors = dict(engine.full_parameters())
    policy = network_tensors(tensors, POLICY)
    whole = trained.whole_tensors(policy) if is_first else {}
    critic = Critic(models, tensors) if is_first else None
    actor_probes = critic_probe = None
    with engine.gathered():
        if critic is not None:
            actor_probes = trained.probes(whole)
            critic_probe = critic.probe()
    if critic is None or actor_probes is None or critic_probe is None:
        return None
    with candidate_folder() as folder:
        checks = write_trained(folder, trained, policy, whole, context, actor_probes)
        critic.write(folder / "critic", tokenization, dtype)
        files: dict[str, FileEntry] = context.store.objects.put_folder(folder)
    critic_entry = put_probe(context.store, critic_probe)
    return Candidate(
        kind="actor_critic",
        files=files,
        checks=(Check("value_model", "critic", critic_entry), *checks),
        outcome=tuned.outcome.ending(),
        metrics={
            **tuned.metrics,
            "response_tokens": int(tuned.outcome.weight),
            "data": prompts.report.to_json(),
        },
        gate_reasons=tuned.gate_reasons,
        contract=tokenization.contract_hash,
        base=trained.base(context),
        stack=trained.lower_stack,
        architecture=model_config(models.networks[POLICY].config, "language_model", dtype),
        exactness=checkpoint.exactness,
        changes=tuple(checkpoint.made_changes),
    )
