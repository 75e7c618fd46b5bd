"""From a draft to a recipe: batches, lengths and warm-ups computed from the numbers of several keys (pure)."""

import math
import re
from collections.abc import Iterable
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.draft import Draft
from recipes.convert.reinforcement import finish_reinforcement
from recipes.convert.rows import parts_of
from recipes.problem_codes import Code

ORDER = (
    "kind", "init_from", "reset_weights", "actor", "rewards", "loss", "lora", "merge", "parts", "trainable",
    "new_tokens", "loss_on", "template", "data", "evaluation", "prompts", "rollout", "train", "algorithm", "shard",
    "center_coefficient",
)  # fmt: skip
"""A stage's keys in the order in which people read them."""
TRAIN_ORDER = (
    "name",
    "iterations",
    "steps",
    "epochs",
    "global_batch",
    "sequence_length",
    "packing",
    "optimizer",
    "schedule",
)
GATED_SHARE = 0.05
"""Share of the pairs that a stage is measured on where a file holds out none."""
_WHOLE = {"parts": "parts of a model are not trained alone here"}
_PAIRS = {"loss_on": "the loss compares whole answers", "train.packing": "pairs are never packed", **_WHOLE}
UNUSED: dict[str, dict[str, str]] = {
    "pretrain": {"loss_on": "every token is learnt", "template": "plain text is read", **_WHOLE},
    "finetune": {},
    "reward": _PAIRS,
    "preference": _PAIRS,
    "rl": {
        "loss_on": "answers are drawn",
        "train.": "`rollout` and `algorithm` say it",
        "evaluation": "an `evaluate` stage measures a policy on other prompts",
        **_WHOLE,
    },
}
"""Targets that a kind of stage does not have, and why."""
NEEDS_ADAPTER = ("lora.", "merge")
STAGE_NAMES = {"finetune": "sft", "pretrain": "base", "reward": "reward", "preference": "preference", "rl": "policy"}


def assemble(draft: Draft, name: str) -> dict[str, Any]:
    """The recipe of a draft as plain data; what it lacks is refused at the key that should say it."""
    kind = draft.values.pop(q.KIND, "finetune")
    draft.values["kind"] = kind
    for target, reason in UNUSED[kind].items():
        draft.retract(target, reason)
    _origin(draft)
    _adapter(draft)
    _preference(draft)
    if kind == "rl":
        finish_reinforcement(draft)
    workers = _batch(draft)
    _length(draft)
    _warmup(draft)
    _optimizer(draft)
    _held_out(draft)
    _filters(draft)
    seed = draft.values.pop(q.SEED, None)
    stage = _nested((target, value) for target, value in draft.values.items() if not target.startswith("@"))
    recipe: dict[str, Any] = {"name": recipe_name(name)}
    if seed is not None:
        recipe["seed"] = seed
    if workers is not None:
        recipe["cluster"] = {"workers": workers}
    return {**recipe, "stages": {STAGE_NAMES[kind]: _sorted(stage)}}


def assemble_part(draft: Draft) -> dict[str, Any]:
    """What files that are only part of a configuration say, as keys of a stage; the workers are the recipe's."""
    draft.values["kind"] = "finetune"
    workers = _batch(draft)
    _warmup(draft)
    for target in (q.STEPS, q.BETA1, q.BETA2, "kind"):
        draft.values.pop(target, None)
    stage = _nested((target, value) for target, value in draft.values.items() if not target.startswith("@"))
    return {**({} if workers is None else {"cluster": {"workers": workers}}), **_sorted(stage)}


def recipe_name(text: str) -> str:
    """A text as the name of a recipe."""
    name = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:63]
    return name if re.match(r"[a-z]", name) else f"recipe-{name}"[:63].rstrip("-")


def model_reference(draft: Draft, written: str, revision: str | None) -> tuple[str, str]:
    """A model as a recipe names it, and what is said of that."""
    is_path = written.startswith((".", "/", "~")) or written.count("/") > 1 or written.endswith("/")
    if is_path or (draft.working_dir / written).is_dir():
        return draft.path(written), ""
    if revision is not None:
        return f"hf://{written}@{revision}", ""
    return f"hf://{written}@main", "a commit hash instead of main keeps a run repeatable"


def _origin(draft: Draft) -> None:
    written, revision = draft.values.pop(q.MODEL, None), draft.values.pop(q.REVISION, None)
    if written is None:
        draft.reject(("model",), None, "no key names the model to start from", Code.MISSING_KEY)
        return
    target = "actor" if draft.get("kind") == "rl" else "init_from"
    draft.values[target], remark = model_reference(draft, written, revision)
    if remark:
        draft.comments[target] = remark


def _adapter(draft: Draft) -> None:
    if (adapter := draft.values.pop(q.ADAPTER, False)) is not False:
        if adapter == "qlora":
            draft.values.setdefault("lora.quantize", "nf4")
        if draft.values["kind"] == "rl":
            draft.retract("lora.quantize", "a policy's weights are whole, since it is sampled from")
        if "lora.target_parameters" in draft.values:
            draft.retract("lora.quantize", "experts with adapters on their parameters are whole")
        if not any(target.startswith("lora.") for target in draft.values):
            draft.values["lora.r"] = 8
    else:
        for prefix in NEEDS_ADAPTER:
            draft.retract(prefix, "no adapter is trained")


def _preference(draft: Draft) -> None:
    """The weight of a preference loss, under the loss's own name for it."""
    weight = draft.values.pop(q.PREFERENCE_WEIGHT, None)
    if draft.get("kind") != "preference":
        draft.retract("loss.", "belongs to preference optimisation")
    elif weight is not None:
        draft.values["loss.odds_weight" if draft.get("loss.name") == "orpo" else "loss.beta"] = weight


def _batch(draft: Draft) -> int | None:
    """Write the batch of a step; return the number of workers where it is known."""
    values = draft.values
    per_node, nodes = values.pop(q.WORKERS, None), values.pop(q.NODES, 1)
    workers = None if per_node is None else per_node * nodes
    micro, accumulation = values.pop(q.MICRO_BATCH, None), values.pop(q.ACCUMULATION, None)
    of_worker = values.pop(q.WORKER_BATCH, None)
    if micro is not None and draft.get("kind") != "rl":
        values.setdefault("shard.micro_batch", micro)
    if "train.global_batch" in values or (micro is None and of_worker is None) or draft.get("kind") == "rl":
        return workers
    steps = of_worker // (micro or 1) if accumulation is None and of_worker is not None else accumulation or 1
    batch = of_worker if micro is None else micro * steps
    assert batch is not None
    values["train.global_batch"] = batch * (workers or 1)
    said = f"micro-batch {micro or 1} x accumulation {steps} x {workers or 1} GPU{'s' if (workers or 1) > 1 else ''}"
    unknown = "" if workers is not None else "; --gpus N for the number that it was written for"
    draft.comments["train.global_batch"] = said + unknown
    return workers


def _length(draft: Draft) -> None:
    values = draft.values
    steps, epochs = values.pop(q.STEPS, None), values.pop(q.EPOCHS, None)
    if "train.tokens" in values or draft.get("kind") == "rl":
        return
    if steps is not None and steps > 0:
        values["train.steps"] = steps
        if epochs is not None:
            draft.comments["train.steps"] = "counts before epochs"
    elif epochs is not None:
        values["train.epochs"] = epochs
    else:
        message = "no key says how long the training is: its steps or epochs"
        draft.reject(("length",), None, message, Code.MISSING_KEY)


def _warmup(draft: Draft) -> None:
    """Steps where the file has them; a share becomes steps where the number of steps is known."""
    values = draft.values
    steps, share = values.pop(q.WARMUP_STEPS, None), values.pop(q.WARMUP_SHARE, None)
    if steps is not None and 0 < steps < 1:
        steps, share = None, steps
    schedule = f"{_loop(draft)}.schedule"
    total = values.get("train.steps")
    if steps:
        values[f"{schedule}.warmup_steps"] = int(steps)
    elif share and total is not None:
        values[f"{schedule}.warmup_steps"] = min(math.ceil(share * total), total - 1)
        draft.comments[f"{schedule}.warmup_steps"] = f"{share:g} of {total} steps"
    elif share:
        values[f"{schedule}.warmup_ratio"] = share


def _optimizer(draft: Draft) -> None:
    values = draft.values
    beta1, beta2 = values.pop(q.BETA1, None), values.pop(q.BETA2, None)
    optimizer = f"{_loop(draft)}.optimizer"
    if beta1 is not None or beta2 is not None:
        values[f"{optimizer}.betas"] = [0.9 if beta1 is None else beta1, 0.999 if beta2 is None else beta2]
    if f"{optimizer}.lr" not in values:
        draft.reject(("learning rate",), None, "no key says the learning rate", Code.MISSING_KEY)


def _held_out(draft: Draft) -> None:
    share = draft.values.pop(q.HELD_OUT_SHARE, None)
    if "data" not in draft.values and "prompts" not in draft.values:
        if not any(line.place and line.place[0] in ("datasets", "dataset") for line in draft.lines):
            draft.reject(("data",), None, "no key names the rows to train on", Code.MISSING_KEY)
        return
    is_gated = draft.get("kind") in ("reward", "preference")
    if (share or is_gated) and "evaluation" not in draft.values:
        for source in parts_of(draft.values["data" if "data" in draft.values else "prompts"]):
            source["hold_out"] = share or GATED_SHARE
        if not share:
            draft.comments["data"] = f"hold_out {GATED_SHARE}: the stage's gate needs pairs that it was not trained on"


def _filters(draft: Draft) -> None:
    """Which rows are left out, of all sources together."""
    found = [draft.values[target] for target in (q.SHORTEST, q.DISTINCT) if target in draft.values]
    if found and "data" in draft.values:
        draft.values["data"]["filter"] = found


def _loop(draft: Draft) -> str:
    """Where a stage has its optimiser."""
    return "algorithm" if draft.get("kind") == "rl" else "train"


def _nested(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for target, value in values:
        *outer, last = target.split(".")
        node = nested
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def _sorted(stage: dict[str, Any]) -> dict[str, Any]:
    def rank(order: tuple[str, ...], key: str) -> int:
        return order.index(key) if key in order else len(order)

    ordered = dict(sorted(stage.items(), key=lambda item: rank(ORDER, item[0])))
    for key in ("train", "algorithm"):
        if isinstance(ordered.get(key), dict):
            ordered[key] = dict(sorted(ordered[key].items(), key=lambda item: rank(TRAIN_ORDER, item[0])))
    return ordered
