"""verl's `main_ppo`: rollouts, updates and rewards."""

from typing import Any

from recipes.convert import quantities as q
from recipes.convert.assemble import model_reference
from recipes.convert.draft import Draft
from recipes.convert.readers import const, lora_targets, number, pair, positive, real, text, truth, whole
from recipes.convert.reinforcement import ADAPT, ALGORITHMS, REWARD, function_name, model_reward
from recipes.convert.rules import OFF, Choice, Place, Section, Table, carried, changed, flag, no_effect, refused, unless
from recipes.convert.systems.transformers_arguments import (
    CHECKPOINTING,
    DIVIDES,
    FASTER,
    LOGGING,
    NO_REMOTE_CODE,
    STORED,
)

BATCH = "@batch"
"""Rows of a step, or prompts of an iteration."""
_KL_IN_LOSS, _KL_IN_REWARD, _LOSS_KL, _REWARD_KL = "@kl_in_loss", "@kl_in_reward", "@loss_kl", "@reward_kl"
_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
_FUNCTION, _FUNCTION_FILE, _CLIP = "@function", "@function_file", "@clip"
_ESTIMATORS = {
    "gae": "gae", "grpo": "grpo", "rloo": "rloo", "rloo_vectorized": "rloo", "reinforce_plus_plus": "reinforce",
    "reinforce_plus_plus_baseline": "reinforce_baseline",
}  # fmt: skip
_ENGINE = "rollout.engine"
_KL_TYPES = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def _estimator(value: Any, draft: Draft, place: Place) -> None:
    """The estimator of the advantage names the algorithm."""
    if value not in _ESTIMATORS:
        draft.reject(place, value, f"must be one of {', '.join(_ESTIMATORS)}")
        return
    settings = ALGORITHMS[_ESTIMATORS[value]]
    draft.note(place, value, carried("algorithm.name", const(settings["name"])))
    for key, setting in settings.items():
        if key != "name":
            draft.values.setdefault(f"algorithm.{key}", setting)


def _reward_model(value: Any, draft: Draft, place: Place) -> None:
    model_reward(draft, place, value, model_reference(draft, str(value), None)[0])


_TO_HOST = changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))
_OFFLOAD = Choice(flag(_TO_HOST).cases, no_effect("where parameters lie changes no result"))
"""A script that takes it from the environment converts all the same."""
PPO: Table = {
    "algorithm.adv_estimator": Section(_estimator, waits=False),
    "algorithm.gamma": carried("algorithm.gamma", real),
    "algorithm.lam": carried("algorithm.lambda", real),
    "algorithm.norm_adv_by_std_in_grpo": flag(OFF, carried("algorithm.scale", const("none"))),
    "algorithm.use_kl_in_reward": flag(carried(_KL_IN_REWARD, truth)),
    "algorithm.kl_ctrl.kl_coef": carried(_REWARD_KL, real),
    "algorithm.kl_ctrl.type": Choice(
        {"fixed": no_effect("is the default"), "adaptive": carried("algorithm.kl_controller.name", const("adaptive"))},
        refused("must be fixed or adaptive"),
    ),
    "algorithm.kl_ctrl.target_kl": carried("algorithm.kl_controller.target", real),
    "algorithm.kl_ctrl.horizon": carried("algorithm.kl_controller.horizon", positive),
    "algorithm.kl_penalty": Choice({"kl": OFF, "k1": OFF}, refused("the penalty in the reward is k1")),
    "algorithm.filter_groups.enable": flag(
        changed(
            "prompts whose answers score the same are left out, none drawn in their place",
            "algorithm.drop_equal_groups",
            truth,
        )
    ),
    "algorithm.filter_groups.*": no_effect("prompts whose answers all score the same are left out"),
    "algorithm.use_pf_ppo": flag(refused("every answer weighs the same")),
    "algorithm.pf_ppo.*": no_effect("belongs to something that is off"),
    "algorithm.rollout_correction.rollout_is": Choice(
        {"token": OFF, "null": OFF, None: OFF}, changed("each token is weighted by itself")
    ),
    "algorithm.rollout_correction.rollout_is_threshold": carried(f"{_ENGINE}.max_importance", real),
    "algorithm.rollout_correction.*": no_effect("each token of vLLM's is weighted by its importance, which is cut off"),
    f"{_MODEL}.path": carried(q.MODEL, text),
    f"{_MODEL}.enable_gradient_checkpointing": flag(carried(CHECKPOINTING, truth)),
    f"{_MODEL}.lora_rank": unless(0, then=carried("lora.r", positive)),
    f"{_MODEL}.lora_alpha": carried("lora.alpha", positive),
    f"{_MODEL}.target_modules": carried("lora.target_modules", lora_targets),
    f"{_MODEL}.lora_adapter_path": refused("an adapter is not trained on; merge it into the model first"),
    f"{_MODEL}.exclude_modules": refused("adapters are put on the modules that are named, or on every linear one"),
    f"{_MODEL}.trust_remote_code": NO_REMOTE_CODE,
    f"{_MODEL}.external_lib": refused("code of yours is not imported"),
    f"{_MODEL}.override_config.*": refused("a model's own configuration counts"),
    f"{_MODEL}.*": FASTER,
    f"{_ACTOR}.optim.lr": carried("algorithm.optimizer.lr", real),
    f"{_ACTOR}.optim.weight_decay": carried("algorithm.optimizer.weight_decay", real),
    f"{_ACTOR}.optim.betas": carried("algorithm.optimizer.betas", pair),
    f"{_ACTOR}.optim.clip_grad": carried("algorithm.gradient_clipping", real),
    f"{_ACTOR}.optim.lr_warmup_steps": unless(-1, then=carried(q.WARMUP_STEPS, number)),
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": carried(q.WARMUP_SHARE, real),
    f"{_ACTOR}.optim.min_lr_ratio": carried("algorithm.schedule.min_ratio", real),
    f"{_ACTOR}.optim.total_training_steps": no_effect("the schedule is as long as the stage"),
    f"{_ACTOR}.grad_clip": carried("algorithm.gradient_clipping", real),
    **dict.fromkeys(
        (f"{_ACTOR}.optim.warmup_style", f"{_ACTOR}.optim.lr_scheduler_type", f"{_ACTOR}.optim.lr_decay_style"),
        Choice(
            {name: carried("algorithm.schedule.name", const(name)) for name in ("constant", "cosine", "linear")},
            refused("must be constant, cosine or linear"),
        ),
    ),
    f"{_ACTOR}.ppo_mini_batch_size": carried(q.UPDATE_PROMPTS, positive),
    f"{_ACTOR}.ppo_epochs": carried("algorithm.epochs", positive),
    f"{_ACTOR}.use_kl_loss": flag(carried(_KL_IN_LOSS, truth)),
    f"{_ACTOR}.kl_loss_coef": carried(_LOSS_KL, real),
    f"{_ACTOR}.kl_loss_type": Choice(
        {name: carried("algorithm.kl_estimator", const(kind)) for name, kind in _KL_TYPES.items()},
        refused(f"must be one of {', '.join(_KL_TYPES)}"),
    ),
    f"{_ACTOR}.clip_ratio": carried(_CLIP, real),
    f"{_ACTOR}.clip_ratio_low": carried("algorithm.clip_low", real),
    f"{_ACTOR}.clip_ratio_high": carried("algorithm.clip_high", real),
    f"{_ACTOR}.clip_ratio_c": carried("algorithm.dual_clip", real),
    f"{_ACTOR}.entropy_coeff": carried("algorithm.entropy_coef", real),
    f"{_ACTOR}.loss_agg_mode": Choice(
        {
            "token-mean": carried("algorithm.aggregation", const("tokens")),
            "seq-mean-token-mean": carried("algorithm.aggregation", const("sequences")),
            "seq-mean-token-sum-norm": carried("algorithm.aggregation", const("constant")),
        },
        refused("must be token-mean, seq-mean-token-mean or seq-mean-token-sum-norm"),
    ),
    f"{_ACTOR}.policy_loss.loss_mode": Choice(
        {
            "vanilla": OFF,
            "gspo": carried(q.LOSS_MODE, const("gspo")),
            "cispo": carried(q.LOSS_MODE, const("cispo")),
        },
        refused("must be vanilla, gspo or cispo"),
    ),
    f"{_ACTOR}.policy_loss.*": no_effect("belongs to another loss"),
    f"{_ACTOR}.freeze_vision_tower": flag(refused("vision-language models are not trained by reinforcement")),
    f"{_ACTOR}.fsdp_config.*offload*": _OFFLOAD,
    f"{_ACTOR}.megatron.*offload*": _OFFLOAD,
    f"{_ACTOR}.checkpoint.*": STORED,
    f"{_ACTOR}.*": DIVIDES,
    f"{_ROLLOUT}.n": carried("rollout.samples_per_prompt", positive),
    f"{_ROLLOUT}.temperature": carried("rollout.temperature", real),
    f"{_ROLLOUT}.top_p": unless(1, 1.0, then=refused("answers are drawn from the whole distribution")),
    f"{_ROLLOUT}.top_k": unless(-1, 0, then=refused("answers are drawn from the whole distribution")),
    f"{_ROLLOUT}.do_sample": flag(OFF, refused("answers are drawn")),
    f"{_ROLLOUT}.val_kwargs.*": LOGGING,
    f"{_ROLLOUT}.multi_turn.enable": flag(refused("answers are drawn in one turn, without tools")),
    f"{_ROLLOUT}.multi_turn.*": no_effect("answers are drawn in one turn"),
    f"{_ROLLOUT}.agent.*": no_effect("answers are drawn in one turn"),
    f"{_ROLLOUT}.name": Choice(
        {"hf": OFF, "vllm": carried(f"{_ENGINE}.name", const("vllm"))},
        changed("the training workers draw the answers, or vLLM: `rollout.engine: {name: vllm}`"),
    ),
    f"{_ROLLOUT}.max_num_seqs": carried(f"{_ENGINE}.max_responses", positive),
    f"{_ROLLOUT}.*": no_effect("belongs to an engine's own set-up; see `rollout.engine`"),
    "actor_rollout_ref.ref.*": DIVIDES,
    "actor_rollout_ref.*": DIVIDES,
    "critic.optim.lr": carried("algorithm.critic.lr", real),
    "critic.cliprange_value": carried("algorithm.critic.clip", real),
    "critic.model.path": changed("the critic starts from the reward model where there is one, else from the actor"),
    "critic.*": no_effect("actor and critic learn on one joint loss, with the actor's schedule"),
    "trainer.critic_warmup": unless(0, then=carried("algorithm.critic.warmup", whole)),
    "reward_model.model.path": Section(_reward_model, waits=False),
    "reward_model.enable": flag(no_effect("`rewards` names the model")),
    "reward_model.reward_kwargs.overlong_buffer_cfg.enable": flag(
        refused("responses that the limit cut off are left out (`drop_overlong`), not charged")
    ),
    "reward_model.*": DIVIDES,
    "custom_reward_function.path": changed(ADAPT, _FUNCTION_FILE, text),
    "custom_reward_function.name": carried(_FUNCTION, text),
    "reward_manager.*": no_effect("`rewards` says what is rewarded"),
    "ray_kwargs.*": DIVIDES,
    "global_profiler.*": LOGGING,
}
DEFAULTS: dict[str, Any] = {
    "data.train_batch_size": 1024, "data.max_prompt_length": 512, "data.max_response_length": 512,
    "data.truncation": "error",
    "algorithm.adv_estimator": "gae", "algorithm.lam": 1.0, "algorithm.kl_ctrl.kl_coef": 0.001,
    f"{_ACTOR}.ppo_mini_batch_size": 256, f"{_ACTOR}.ppo_epochs": 1, f"{_ACTOR}.kl_loss_coef": 0.001,
    f"{_ACTOR}.optim.lr": 1e-6, f"{_ACTOR}.optim.weight_decay": 0.01, f"{_ACTOR}.clip_ratio_c": 3.0,
    f"{_ACTOR}.loss_agg_mode": "token-mean", f"{_MODEL}.enable_gradient_checkpointing": True, "critic.optim.lr": 1e-5,
    "critic.cliprange_value": 0.5, "trainer.total_epochs": 30,
}  # fmt: skip


def finish_ppo(draft: Draft) -> None:
    """Where the penalty enters and how large it is; what is rewarded where no key says it."""
    values = draft.values
    in_loss, in_reward = values.pop(_KL_IN_LOSS, False), values.pop(_KL_IN_REWARD, False)
    loss_kl, reward_kl = values.pop(_LOSS_KL, 0.0), values.pop(_REWARD_KL, 0.0)
    values.pop(q.MICRO_BATCH, None)
    if in_loss and in_reward:
        draft.reject((f"{_ACTOR}.use_kl_loss",), True, "the penalty enters the loss or the reward, not both")
    values["algorithm.kl_in"] = "loss" if in_loss else "reward"
    values["algorithm.kl_coef"] = loss_kl if in_loss else reward_kl if in_reward else 0.0
    if not in_loss:
        draft.retract("algorithm.kl_estimator", "the penalty is not in the loss")
    elif values.get("algorithm.kl_estimator") == "k1":
        draft.retract("algorithm.kl_estimator", "k1 in the loss holds nothing; k2 is taken")
    if values.get("algorithm.kl_controller.name") != "adaptive":
        draft.retract("algorithm.kl_controller.", "the coefficient is fixed")
    if (clip := values.pop(_CLIP, None)) is not None:
        values.setdefault("algorithm.clip_low", clip)
        values.setdefault("algorithm.clip_high", clip)
    if q.LOSS_MODE in values:
        draft.retract("algorithm.aggregation", "this algorithm has its own")
        draft.retract("algorithm.dual_clip", "this algorithm has its own")
    if f"{_ENGINE}.name" not in values:
        draft.retract(f"{_ENGINE}.", "the policy's own code draws the answers: there is nothing to correct or to set")
    _reward(draft)
    values.setdefault("algorithm.schedule.name", "constant")


def _reward(draft: Draft) -> None:
    """A model, a function of the user's, or verl's own scores."""
    if f"rewards.{REWARD}.model" in draft.values:
        return
    file, function = draft.values.pop(_FUNCTION_FILE, None), draft.values.pop(_FUNCTION, "compute_score")
    draft.values[f"rewards.{REWARD}.python"] = function_name(file or "reward.py", function)
    draft.values[f"rewards.{REWARD}.columns"] = ["data_source", "reward_model"]
    if file is None:
        rule = changed("verl scores by `data_source` with its own code: write the function that the recipe names")
        draft.note(("reward",), None, rule)
