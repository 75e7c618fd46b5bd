"""From rollouts, updates and rewards of another system to a stage of reinforcement learning (pure)."""

import math
import re
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.draft import Draft
from recipes.convert.rules import carried
from recipes.problem_codes import Code

ADAPT = (
    "the function takes a list of texts and one of rows, and gives as many numbers: adapt it, in the recipe's folder"
)
REWARD = "reward"
"""The one term of a converted reward."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gae": {"name": "ppo"},
    "grpo": {"name": "grpo"},
    "dr_grpo": {"name": "grpo", "scale": "none", "aggregation": "constant"},
    "rloo": {"name": "rloo"},
    "reinforce": {"name": "reinforce_plus_plus"},
    "reinforce_baseline": {"name": "reinforce_plus_plus", "baseline": "group"},
}
"""Algorithms by the estimator of the advantage, and the settings that make them those of the papers."""
HAS_CRITIC = ("ppo",)
COMPARES = ("grpo", "gspo", "cispo")


def finish_reinforcement(draft: Draft) -> None:
    """Count iterations and mini-batches, and take away what the algorithm has not."""
    values = draft.values
    values.setdefault("algorithm.name", "ppo")
    if (mode := values.pop(q.LOSS_MODE, None)) is not None:
        values["algorithm.name"] = mode
    name = values["algorithm.name"]
    if name not in HAS_CRITIC:
        draft.retract("algorithm.critic.", f"{name} has no critic")
        draft.retract("algorithm.lambda", f"{name} has no critic")
    if name in (*COMPARES, "rloo"):
        draft.retract("algorithm.gamma", f"{name} scores whole responses")
    if name in HAS_CRITIC and f"rewards.{REWARD}.model" not in values:
        values["algorithm.critic.start"] = "actor"
    if name != "grpo":
        draft.retract("algorithm.aggregation", f"{name} has one way to take the mean")
    if name not in COMPARES:
        draft.retract("algorithm.scale", f"{name} does not divide by a deviation")
    if name not in (*COMPARES, "rloo"):
        draft.retract("algorithm.drop_", f"{name} does not compare responses")
    if name == "cispo":
        draft.retract("algorithm.clip_", "cispo bounds the weight of a token instead")
    _iterations(draft)
    _mini_batches(draft)
    if not any(target.startswith("rewards.") for target in values):
        draft.reject(("reward",), None, "no key says what a response is rewarded for", Code.MISSING_KEY)


def _iterations(draft: Draft) -> None:
    values = draft.values
    prompts = values.get("rollout.prompts_per_iteration", 1)
    steps, passes, rows = values.pop(q.STEPS, None), values.pop(q.EPOCHS, 1), values.pop(q.ROWS, None)
    if steps is not None and steps > 0:
        values["algorithm.iterations"] = int(steps)
    elif rows is not None:
        values["algorithm.iterations"] = max(1, math.floor(rows * passes / prompts))
        draft.comments["algorithm"] = f"iterations: {rows} rows x {passes:g} passes / {prompts} prompts"
    else:
        message = "iterations follow from the number of rows, which the file does not say; --rows N says it"
        draft.reject(("iterations",), None, message, Code.MISSING_KEY)


def _mini_batches(draft: Draft) -> None:
    """Optimiser steps of an iteration: its responses by those of a step."""
    values = draft.values
    responses = values.get("rollout.prompts_per_iteration", 1) * values.get("rollout.samples_per_prompt", 1)
    step = values.pop(q.UPDATE_RESPONSES, None)
    if step is None and (prompts := values.pop(q.UPDATE_PROMPTS, None)) is not None:
        step = prompts * values.get("rollout.samples_per_prompt", 1)
    if step is None:
        return
    if responses % step:
        message = f"a step of {step} responses does not divide an iteration's {responses}"
        draft.reject(("batch",), step, message, Code.NOT_DIVISIBLE)
        return
    values["algorithm.mini_batches"] = responses // step


def split_length(draft: Draft, total: int) -> None:
    """Lengths of prompt and answer where one number holds for both together."""
    answer = draft.values.get("rollout.max_new_tokens")
    if answer is None:
        draft.values["rollout.max_new_tokens"] = answer = total // 2
        draft.comments["rollout"] = f"{total} tokens of prompt and answer together: half for each"
    draft.values.setdefault("rollout.max_prompt_tokens", max(8, total - answer))


def function_name(written: str, function: str) -> str:
    """A function in a Python file, as a recipe names it: the file lies in the recipe's folder."""
    module = re.sub(r"[^A-Za-z0-9_]", "_", written.rpartition("/")[2].removesuffix(".py"))
    return f"{module if re.match('[A-Za-z_]', module) else f'reward_{module}'}:{function}"


def model_reward(draft: Draft, place: Any, written: str, reference: str) -> None:
    """A reward model."""
    draft.note(place, written, carried(f"rewards.{REWARD}.model", lambda _: reference))
