"""OpenRLHF's `train_ppo_ray`: rollouts, updates and rewards."""

from typing import Any

from recipes.convert import quantities as q
from recipes.convert.assemble import model_reference
from recipes.convert.draft import Draft
from recipes.convert.readers import const, one_of, pair, positive, real, text, truth, whole
from recipes.convert.reinforcement import ADAPT, ALGORITHMS, REWARD, function_name, model_reward
from recipes.convert.rules import (
    Choice,
    Place,
    Section,
    Table,
    Unfit,
    carried,
    changed,
    flag,
    no_effect,
    refused,
    unless,
)
from recipes.convert.systems.transformers_arguments import CHECKPOINTING, DIVIDES, FASTER, LOGGING

_LR = "algorithm.optimizer"
_SCHEDULES = {
    "cosine_with_min_lr": "cosine", "cosine": "cosine", "linear": "linear", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip


def _estimator(value: Any, draft: Draft, place: Place) -> None:
    """The estimator of the advantage names the algorithm."""
    name = "grpo" if value == "group_norm" else value
    if name not in ALGORITHMS:
        draft.reject(place, value, "must be one of gae, reinforce, reinforce_baseline, rloo, group_norm, dr_grpo")
        return
    settings = ALGORITHMS[name]
    draft.note(place, value, carried("algorithm.name", const(settings["name"])))
    for key, setting in settings.items():
        if key != "name":
            draft.values.setdefault(f"algorithm.{key}", setting)


def _bounds(value: Any, draft: Draft, place: Place) -> None:
    """Two bounds of the ratio."""
    try:
        low, high = pair(value)
    except Unfit as error:
        draft.reject(place, value, str(error), error.code)
        return
    for target in ("algorithm.clip_low", "algorithm.clip_high"):
        draft.values.pop(target, None)
    draft.note(place, value, carried("algorithm.clip_low", const(low)))
    draft.values["algorithm.clip_high"] = high


def _clip(value: Any, draft: Draft, place: Place) -> None:
    """One bound for both sides, unless two are given."""
    draft.note(place, value, carried("algorithm.clip_low", real))
    draft.values.setdefault("algorithm.clip_high", draft.get("algorithm.clip_low"))


def _reward_model(value: Any, draft: Draft, place: Place) -> None:
    model_reward(draft, place, value, model_reference(draft, str(value), None)[0])


def _reward_address(value: Any, draft: Draft, place: Place) -> None:
    """An endpoint, or a file with a function."""
    written = str(value)
    if written.endswith(".py"):
        draft.note(
            place, value, changed(ADAPT, f"rewards.{REWARD}.python", const(function_name(written, "reward_func")))
        )
    else:
        rule = changed(
            "gets {responses, rows} and answers {rewards}: its protocol is another", f"rewards.{REWARD}.url", text
        )
        draft.note(place, value, rule)


PPO: Table = {
    "actor.model_name_or_path": carried(q.MODEL, text),
    "reward.model_name_or_path": Section(_reward_model, waits=False),
    "reward.remote_url": Section(_reward_address, waits=False),
    "reward.normalize_enable": no_effect("a reward model's scores are normalised by what its stage measured"),
    "reward.clip_range": changed("normalised scores are clipped to plus or minus `clip`"),
    "reward.overlong_*": refused("responses that the limit cut off are left out (`drop_overlong`), not charged"),
    "reward.stop_properly_penalty_coef": refused("write `algorithm.missing_eos_penalty`"),
    "reward.*": DIVIDES,
    "critic.model_name_or_path": refused("a critic starts from the actor or the reward model"),
    "critic.adam.lr": carried("algorithm.critic.lr", real),
    "critic.value_clip": carried("algorithm.critic.clip", real),
    "critic.freezing_steps": unless(-1, then=carried("algorithm.critic.warmup", whole)),
    "critic.*": no_effect("actor and critic learn on one joint loss, with the actor's schedule"),
    "actor.adam.lr": carried(f"{_LR}.lr", real),
    "actor.adam.betas": carried(f"{_LR}.betas", pair),
    "actor.adam.eps": carried(f"{_LR}.eps", real),
    "actor.adam.weight_decay": carried(f"{_LR}.weight_decay", real),
    "actor.optim": unless("adam", then=refused("another optimiser than AdamW")),
    "actor.muon.*": no_effect("belongs to another optimiser"),
    "actor.lr_scheduler": carried("algorithm.schedule.name", one_of(_SCHEDULES)),
    "actor.lr_warmup_ratio": carried("algorithm.schedule.warmup_ratio", real),
    "actor.min_lr_ratio": carried("algorithm.schedule.min_ratio", real),
    "actor.max_norm": carried("algorithm.gradient_clipping", real),
    "actor.eps_clip": Section(_clip, waits=False),
    "actor.eps_clip_low_high": Section(_bounds, waits=False),
    "actor.dual_clip": carried("algorithm.dual_clip", real),
    "actor.entropy_coef": carried("algorithm.entropy_coef", real),
    "actor.policy_loss_type": Choice(
        {"ppo": no_effect("is the default"), "gspo": carried(q.LOSS_MODE, const("gspo"))},
        refused("must be ppo or gspo"),
    ),
    "actor.aux_loss_coef": unless(0, 0.0, then=changed("a model's own configuration decides about its router loss")),
    "actor.gradient_checkpointing_enable": flag(carried(CHECKPOINTING, truth)),
    "actor.gradient_checkpointing_reentrant": FASTER,
    "actor.freeze_visual_encoder": flag(refused("vision-language models are not trained by reinforcement")),
    "actor.num_gpus_per_node": carried(q.WORKERS, positive),
    "actor.num_nodes": carried(q.NODES, positive),
    "ref.offload": FASTER,
    "ref.num_*": DIVIDES,
    "vllm.num_engines": unless(0, then=carried("rollout.engine.name", const("vllm"))),
    "vllm.*": no_effect("each worker has a process of vLLM, which takes over its weights in every iteration"),
    "rollout.batch_size": carried("rollout.prompts_per_iteration", positive),
    "rollout.n_samples_per_prompt": carried("rollout.samples_per_prompt", positive),
    "rollout.max_new_tokens": carried("rollout.max_new_tokens", positive),
    "rollout.temperature": carried("rollout.temperature", real),
    "rollout.top_p": unless(1, 1.0, then=refused("answers are drawn from the whole distribution")),
    "rollout.*": FASTER,
    "train.num_episodes": carried(q.EPISODES, real),
    "train.colocate_*": DIVIDES,
    "train.dynamic_batch_enable": FASTER,
    "train.max_tokens_per_gpu": FASTER,
    "train.async_enable": flag(changed("rollouts and updates take turns, so that every answer is the policy's own")),
    "train.async_queue_size": DIVIDES,
    "train.partial_rollout_enable": flag(changed("answers are drawn whole")),
    "train.enable_ema": flag(refused("no moving average of the weights is kept")),
    "train.ema_beta": no_effect("belongs to something that is off"),
    "train.agent_func_path": refused("answers are drawn in one turn, without an agent's code"),
    "algo.advantage.estimator": Section(_estimator, waits=False),
    "algo.advantage.gamma": carried("algorithm.gamma", real),
    "algo.advantage.lambd": carried("algorithm.lambda", real),
    "algo.advantage.no_std_norm": flag(carried("algorithm.scale", const("none"))),
    "algo.advantage.is_correction_*": no_effect(
        "answers are drawn by the policy's own code: there is nothing to correct"
    ),
    "algo.kl.init_coef": carried("algorithm.kl_coef", real),
    "algo.kl.estimator": carried("algorithm.kl_estimator", one_of({name: name for name in ("k1", "k2", "k3")})),
    "algo.kl.use_loss": flag(carried("algorithm.kl_in", const("loss"))),
    "algo.kl.target": carried("algorithm.kl_controller.target", real),
    "algo.kl.horizon": carried("algorithm.kl_controller.horizon", positive),
    "algo.dynamic_filtering_enable": flag(
        changed(
            "prompts whose answers score the same are left out, none drawn in their place",
            "algorithm.drop_equal_groups",
            truth,
        )
    ),
    "algo.dynamic_filtering_range": changed("prompts whose answers all score the same are left out"),
    "eval.temperature": LOGGING,
    "eval.n_samples_per_prompt": LOGGING,
    "data.label_key": carried(f"rewards.{REWARD}.columns", lambda value: [text(value)]),
    "data.image_key": no_effect("images are not read by reinforcement learning"),
    "data.max_images_per_prompt": unless(0, then=refused("images are not read by reinforcement learning")),
    "data.prompt_probs": refused("a stage reads one source"),
}
DEFAULTS: dict[str, Any] = {
    "rollout.batch_size": 1024, "train.batch_size": 128, "train.max_epochs": 1, "train.seed": 42, "data.max_len": 2048,
    "data.input_key": "input", "ds.zero_stage": 2, "ds.param_dtype": "bf16", "actor.adam.lr": 1e-6,
    "actor.adam.betas": [0.9, 0.95], "critic.adam.lr": 9e-6, "actor.lr_scheduler": "cosine_with_min_lr",
    "actor.lr_warmup_ratio": 0.03, "actor.min_lr_ratio": 0.1, "critic.value_clip": 0.5, "algo.kl.init_coef": 0.01,
    "algo.advantage.lambd": 1.0, "algo.advantage.estimator": "gae",
}  # fmt: skip


def finish_ppo(draft: Draft) -> None:
    """The batch of a step in responses, passes over them, and where the penalty enters."""
    values = draft.values
    if (batch := values.pop("train.global_batch", None)) is not None:
        values[q.UPDATE_RESPONSES] = batch
    values["algorithm.epochs"] = int(values.pop(q.PASSES, 1))
    values.setdefault("algorithm.kl_in", "reward")
    values.pop(q.MICRO_BATCH, None)
    if "algorithm.kl_controller.target" in values:
        values["algorithm.kl_controller.name"] = "adaptive"
    else:
        draft.retract("algorithm.kl_controller.", "the coefficient is fixed")
    if values.get("algorithm.kl_in") == "loss" and values.get("algorithm.kl_estimator") == "k1":
        draft.retract("algorithm.kl_estimator", "k1 in the loss holds nothing; k2 is taken")
    if (rows := values.get("@limit")) is not None:
        values.setdefault(q.ROWS, rows)
