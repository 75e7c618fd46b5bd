"""TRL's `trl grpo`: rollouts, updates and rewards."""

import re
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.assemble import model_reference
from recipes.convert.draft import Draft
from recipes.convert.readers import const, positive, real, texts, truth
from recipes.convert.reinforcement import ADAPT, model_reward
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
from recipes.convert.systems.transformers_arguments import CHECKPOINTING, FASTER, LOGGING, OWN_TEMPLATE
from recipes.problem_codes import Code

MARKS = frozenset({"num_generations", "reward_funcs", "max_completion_length"})
"""Keys that only its files have."""
_GENERATION_STEPS, _GENERATION_BATCH, _WEIGHTS = "@generation_steps", "@generation_batch", "@reward_weights"
_THINKING = r"(?s)<think>(?!.*<think>).*?</think>.*"
_ELSEWHERE = "answers are drawn from the whole distribution"
_OWN_ENGINE = no_effect("each worker has a process of vLLM, which takes over its weights in every iteration")

_FUNCTIONS: dict[str, dict[str, Any]] = {
    "accuracy_reward": {"rule": "math_verify", "column": "solution"},
    "think_format_reward": {"rule": "regex", "pattern": _THINKING, "whole": True},
}
"""TRL's functions that are rules of a recipe."""
_NOT_RULES = {
    "reasoning_accuracy_reward": "no rule reads what follows </think>: write a function, `module.function`",
    "get_soft_overlong_punishment": "responses that the limit cut off are left out (`mask_truncated_completions`), not "
    "charged",
}


def _functions(value: Any, draft: Draft, place: Place) -> None:
    """`reward_funcs`: TRL's by name, others by module and name."""
    try:
        names = texts(value)
    except Unfit as error:
        draft.reject(place, value, str(error), error.code)
        return
    for index, name in enumerate(names):
        here, (module, _, function) = (*place, index), name.rpartition(".")
        if name in _FUNCTIONS:
            for key, setting in _FUNCTIONS[name].items():
                draft.note(here, name, carried(f"rewards.{name}.{key}", const(setting)))
        elif name in _NOT_RULES:
            draft.reject(here, name, _NOT_RULES[name])
        elif re.fullmatch(r"[A-Za-z_][\w.]*", module):
            draft.note(here, name, changed(ADAPT, f"rewards.{function}.python", const(f"{module}:{function}")))
        else:
            known = ", ".join((*_FUNCTIONS, *_NOT_RULES))
            draft.reject(here, name, f"must be one of {known}, or module.function", Code.UNKNOWN_CHOICE)


def _reward_model(value: Any, draft: Draft, place: Place) -> None:
    model_reward(draft, place, value, model_reference(draft, str(value), None)[0])


def _weights(value: Any) -> list[float]:
    if not isinstance(value, list):
        raise Unfit("must be a list of numbers", Code.WRONG_TYPE)
    return [real(item) for item in value]


def _mean(name: str) -> Any:
    return carried("algorithm.aggregation", const(name))


_SCALES: Table = {
    "group": carried("algorithm.scale", const("group")),
    "batch": carried("algorithm.scale", const("batch")),
}
_UNSCALED = carried("algorithm.scale", const("none"))
LOSSES = {
    "grpo": _mean("sequences"),
    "dapo": _mean("tokens"),
    "bnpo": changed(
        "the mean is that of a step's tokens, not of each worker's", "algorithm.aggregation", const("tokens")
    ),
    "dr_grpo": _mean("constant"),
    "cispo": carried(q.LOSS_MODE, const("cispo")),
    **dict.fromkeys(("sapo", "luspo", "vespo"), refused("a loss that no algorithm has")),
}
"""Values of `loss_type` that are GRPO's."""
GRPO: Table = {
    "reward_funcs": Section(_functions, waits=False),
    "reward_model_name_or_path": Section(_reward_model, waits=False),
    "reward_weights": carried(_WEIGHTS, _weights),
    "multi_objective_aggregation": unless(
        "sum_then_normalize", then=refused("rewards are summed with their weights, then compared")
    ),
    "num_generations": carried("rollout.samples_per_prompt", positive),
    "num_generations_eval": LOGGING,
    "max_completion_length": carried("rollout.max_new_tokens", positive),
    "max_prompt_length": carried("rollout.max_prompt_tokens", positive),
    "temperature": carried("rollout.temperature", real),
    "top_p": unless(1, 1.0, then=refused(_ELSEWHERE)),
    "top_k": unless(0, -1, then=refused(_ELSEWHERE)),
    "min_p": unless(0, 0.0, then=refused(_ELSEWHERE)),
    "repetition_penalty": unless(1, 1.0, then=refused(_ELSEWHERE)),
    "generation_kwargs": refused(_ELSEWHERE),
    "chat_template_kwargs": changed(OWN_TEMPLATE),
    "use_vllm": flag(carried("rollout.engine.name", const("vllm"))),
    "vllm_structured_outputs_regex": refused(_ELSEWHERE),
    "vllm_guided_decoding_regex": refused(_ELSEWHERE),
    "vllm_*": _OWN_ENGINE,
    "use_transformers_paged": FASTER,
    "cache_implementation": FASTER,
    "ds3_gather_for_generation": FASTER,
    "steps_per_generation": carried(_GENERATION_STEPS, positive),
    "generation_batch_size": carried(_GENERATION_BATCH, positive),
    "num_iterations": carried("algorithm.epochs", positive),
    "epsilon": carried("algorithm.clip_low", real),
    "epsilon_high": carried("algorithm.clip_high", real),
    "delta": carried("algorithm.dual_clip", real),
    "importance_sampling_level": Choice(
        {"token": no_effect("is the default"), "sequence": carried(q.LOSS_MODE, const("gspo"))},
        refused("must be token or sequence"),
    ),
    "scale_rewards": Choice(
        {**_SCALES, True: _SCALES["group"], "none": _UNSCALED, False: _UNSCALED},
        refused("differences are divided by the deviation of the group, of the batch, or by nothing"),
    ),
    "mask_truncated_completions": flag(carried("algorithm.drop_overlong", truth)),
    "top_entropy_quantile": unless(1, 1.0, then=refused("every token of an answer learns")),
    "off_policy_mask_threshold": refused("every answer of an iteration learns"),
    "ref_model_mixup_alpha": no_effect("belongs to something that is off"),
    "ref_model_sync_steps": no_effect("belongs to something that is off"),
    "cast_lm_head_to_fp32": changed("the head works in the stage's precision, and probabilities in fp32"),
    "log_completions*": LOGGING,
    "num_completions_to_print": LOGGING,
    "log_unique_prompts": LOGGING,
}
DEFAULTS = {
    "learning_rate": 1e-6, "num_generations": 8, "max_completion_length": 256, "beta": 0.0, "num_iterations": 1,
    "epsilon": 0.2, "scale_rewards": "group", "loss_type": "dapo", "use_vllm": False,
}  # fmt: skip


def finish_grpo(draft: Draft) -> None:
    """The experience of an iteration and its steps, the weights of rewards, and where the penalty enters.

    There batches are completions: those of a step are `per_device_train_batch_size` x accumulation x GPUs, those of an
    iteration as many for each of `steps_per_generation`, by default those of one step.
    """
    values = draft.values
    values.setdefault("algorithm.name", "grpo")
    if values.get(q.ADAPTER):
        draft.retract(CHECKPOINTING, "activations are kept: several adapters learn on one network")
    for target in [target for target in values if target.startswith(("train.optimizer.", "train.schedule."))]:
        draft.move(target, target.replace("train.", "algorithm.", 1))
    draft.move("train.gradient_clipping", "algorithm.gradient_clipping")
    values["algorithm.kl_coef"] = values.pop(q.PREFERENCE_WEIGHT, 0.0)
    values |= {"algorithm.kl_in": "loss", "algorithm.kl_estimator": "k3"}
    if "algorithm.clip_low" in values:
        values.setdefault("algorithm.clip_high", values["algorithm.clip_low"])
    if values.get(q.LOSS_MODE) == "cispo":
        _bound_ratio(draft)
    _batches(draft)
    names = list(dict.fromkeys(target.split(".")[1] for target in values if target.startswith("rewards.")))
    weights = values.pop(_WEIGHTS, None)
    if weights is not None and len(weights) != len(names):
        draft.reject(("reward_weights",), weights, f"there are {len(names)} rewards", Code.NOT_DIVISIBLE)
    elif weights is not None:
        values |= {f"rewards.{name}.weight": weight for name, weight in zip(names, weights, strict=True)}


def _bound_ratio(draft: Draft) -> None:
    """CISPO's `epsilon_high` is the largest weight itself, and by default `epsilon`."""
    bound = draft.values.get("algorithm.clip_high", 0)
    if bound > 1:
        draft.values["algorithm.max_ratio"] = bound
    else:
        message = "with cispo it is the largest weight of a token, which must be above 1"
        draft.reject(("epsilon_high",), bound, message, Code.OUT_OF_RANGE)


def _batches(draft: Draft) -> None:
    values = draft.values
    workers = values.get(q.WORKERS, 1) * values.get(q.NODES, 1)
    micro, accumulation = values.pop(q.MICRO_BATCH, 8), values.pop(q.ACCUMULATION, 1)
    step = micro * accumulation * workers
    steps = values.pop(_GENERATION_STEPS, accumulation)
    drawn = values.pop(_GENERATION_BATCH, micro * steps * workers)
    samples = values.get("rollout.samples_per_prompt", 1)
    if drawn % samples:
        message = f"an iteration of {drawn} answers has no whole number of prompts with {samples} answers each"
        draft.reject(("num_generations",), samples, message, Code.NOT_DIVISIBLE)
        return
    values["rollout.prompts_per_iteration"], values[q.UPDATE_RESPONSES] = drawn // samples, step
    unknown = "" if q.WORKERS in values else "; --gpus N for the number that it was written for"
    draft.comments["rollout"] = (
        f"{drawn} answers: {micro} x {steps} x {workers} GPU{'s' if workers > 1 else ''}, {samples} a prompt{unknown}"
    )
    if (total := values.get(q.STEPS)) is not None:
        taken = max(1, drawn // step) * values.get("algorithm.epochs", 1)
        values[q.STEPS] = max(1, total // taken)
