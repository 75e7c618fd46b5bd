"""TRL's YAML and arguments, as `trl sft --config FILE` and its other commands read them."""

from collections.abc import Mapping
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.command_line import COMMAND
from recipes.convert.draft import Draft
from recipes.convert.readers import const, lora_targets, module_names, one_of, positive, real, share, text, truth
from recipes.convert.rows import find_source, merge_sources
from recipes.convert.rules import (
    OFF,
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
from recipes.convert.system import System
from recipes.convert.systems.deepspeed import NAMED_FILE
from recipes.convert.systems.transformers_arguments import (
    DIVIDES,
    FASTER,
    LOADING,
    MODEL_ARGUMENTS,
    OWN_TEMPLATE,
    OWN_TOKENS,
    TRAINING_ARGUMENTS,
    TRAINING_DEFAULTS,
)
from recipes.convert.systems.trl_grpo import DEFAULTS as GRPO_DEFAULTS
from recipes.convert.systems.trl_grpo import GRPO, LOSSES, MARKS, finish_grpo
from recipes.problem_codes import Code

_NAME, _CONFIG, _TRAIN_SPLIT, _TEST_SPLIT, _TEXT = "@dataset", "@config", "@train_split", "@test_split", "@text_column"


def _loss(value: Any) -> str:
    """A preference loss; TRL takes a list of them, whose sum it is."""
    listed = value if isinstance(value, list) else [value]
    if len(listed) != 1:
        raise Unfit("a preference stage has one loss")
    names = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "robust", "kto": "kto"}
    found: str = one_of(names)(listed[0])
    return found


_MODEL: Table = {
    **MODEL_ARGUMENTS,
    "use_peft": flag(carried(q.ADAPTER, truth)),
    "lora_r": carried("lora.r", positive),
    "lora_alpha": carried("lora.alpha", positive),
    "lora_dropout": carried("lora.dropout", real),
    "lora_target_modules": carried("lora.target_modules", lora_targets),
    "use_rslora": flag(carried("lora.rank_stabilised", truth)),
    "use_dora": flag(carried("lora.dora", truth)),
    "lora_task_type": no_effect("follows from the kind of stage"),
    "lora_modules_to_save": carried("lora.modules_to_save", module_names),
    "lora_target_parameters": carried("lora.target_parameters", module_names),
    "model_init_kwargs": changed("the model is opened as its own configuration says"),
    "router_aux_loss_coef": changed("a model's own configuration decides about its router loss"),
    "disable_dropout": no_effect("a model's own configuration decides about dropout"),
    "chat_template_path": changed(OWN_TEMPLATE),
    "eos_token": changed(OWN_TOKENS),
    "pad_token": no_effect("padding is in neither loss nor attention"),
}


def _read_mixture(value: Any, draft: Draft, place: Place) -> None:
    """`datasets`, a list of them."""
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        draft.reject(place, value, "must be a list of data sets, each a mapping with `path`", Code.WRONG_TYPE)
        return
    sources = []
    for index, item in enumerate(value):
        if unknown := sorted(item.keys() - {"path", "name", "split", "data_files"}):
            draft.reject((*place, index, unknown[0]), item[unknown[0]], "a source has path, name, split and data_files")
            return
        try:
            path = text(item.get("path"))
            hub = {key: item.get(key) for key in ("name", "split")}
            sources.append(find_source(draft, path, files=item.get("data_files"), **hub))
        except Unfit as error:
            draft.reject((*place, index), item, str(error), error.code)
            return
    target = "prompts" if draft.get(q.KIND) == "rl" else "data"
    draft.note(place, value, carried(target, const(merge_sources(sources))))


_DATA: Table = {
    "dataset_name": carried(_NAME, text),
    "dataset_config": carried(_CONFIG, text),
    "dataset_train_split": carried(_TRAIN_SPLIT, text),
    "dataset_test_split": carried(_TEST_SPLIT, text),
    "dataset_text_field": carried(_TEXT, text),
    "test_split_size": carried(q.HELD_OUT_SHARE, share),
    "datasets": Section(_read_mixture),
    "dataset_kwargs": LOADING,
    "dataset_num_proc": LOADING,
    "dataset_streaming": LOADING,
    "streaming": LOADING,
    "shuffle_dataset": flag(LOADING, refused("rows are read in an order drawn from the seed")),
    "max_length": carried("train.sequence_length", positive),
    "truncation_mode": unless("keep_start", then=refused("longer rows lose their end")),
    "packing": carried("train.packing", truth),
    "packing_strategy": unless("bfd", then=changed("rows are packed whole, best fit first")),
    "eval_packing": FASTER,
    "padding_free": FASTER,
    "pad_to_multiple_of": FASTER,
    "activation_offloading": flag(FASTER),
    "completion_only_loss": flag(carried("loss_on", const("responses")), carried("loss_on", const("all"))),
    "assistant_only_loss": flag(
        carried("loss_on", const("responses")),
        changed("of conversations TRL learns every token, of prompts and completions the completions alone"),
    ),
    "gradient_checkpointing_use_reentrant": FASTER,
    "ignore_bias_buffers": FASTER,
}
_METHOD: Table = {
    COMMAND: Choice(
        {
            "sft": carried(q.KIND, const("finetune")),
            "reward": carried(q.KIND, const("reward")),
            "dpo": carried(q.KIND, const("preference")),
            "kto": carried("loss.name", const("kto")),
            "grpo": carried(q.KIND, const("rl")),
        },
        refused("must be sft, reward, dpo, kto or grpo"),
    ),
    "loss_type": Choice({**LOSSES, "nll": OFF, "chunked_nll": OFF}, carried("loss.name", _loss)),
    "beta": carried(q.PREFERENCE_WEIGHT, real),
    "desirable_weight": carried("loss.desirable_weight", real),
    "undesirable_weight": carried("loss.undesirable_weight", real),
    "label_smoothing": carried("loss.label_smoothing", real),
    "precompute_ref_*": FASTER,
    "loss_weights": refused("a preference stage has one loss"),
    "use_weighting": flag(refused("every pair weighs the same")),
    "f_divergence_type": unless("reverse_kl", then=refused("rewards are log-ratios")),
    "ld_alpha": refused("every token of an answer weighs the same"),
    "sync_ref_model": flag(refused("the reference is the model that the stage starts from")),
    "center_rewards_coefficient": carried("center_coefficient", real),
}
_PLACEMENT: Table = {"deepspeed": NAMED_FILE, "fsdp": changed("ZeRO 3 shards the same", "shard.zero", const(3)),
                     "fsdp_config": DIVIDES, "config": LOADING, "accelerate_config": DIVIDES}  # fmt: skip


def _finish(draft: Draft) -> None:
    """Rows from the names of a data set and its splits; which command reads the file."""
    if draft.get("loss.name") == "kto":
        draft.values[q.KIND] = "preference"
    if q.KIND not in draft.values and any(
        line.place[:1] and line.place[0] in MARKS and not line.is_default for line in draft.lines
    ):
        draft.values[q.KIND] = "rl"
    if q.KIND not in draft.values:
        marks = {"center_coefficient": "reward", q.PREFERENCE_WEIGHT: "preference", "loss.name": "preference"}
        draft.values[q.KIND] = next((kind for key, kind in marks.items() if key in draft.values), "finetune")
        draft.comments["kind"] = (
            "TRL's files do not say which command reads them; --from trl:sft, trl:reward, trl:dpo, trl:kto does"
        )
    is_rl = draft.values[q.KIND] == "rl"
    if is_rl:
        finish_grpo(draft)
    else:
        draft.retract("rollout.", "pairs that are longer than the sequence are dropped and counted")
        for prefix in ("rewards.", "algorithm."):
            draft.retract(prefix, "belongs to reinforcement learning")
    name = draft.get(_NAME)
    if name is not None and "data" not in draft.values:
        trained = "prompts" if is_rl else "data"
        for target, split in ((trained, draft.get(_TRAIN_SPLIT)), ("evaluation", draft.get(_TEST_SPLIT))):
            if target == trained or (split is not None and not is_rl):
                draft.values[target] = find_source(draft, name, name=draft.get(_CONFIG), split=split)
                if draft.get(_TEXT) not in (None, "text"):
                    draft.values[target]["columns"] = {"text": draft.get(_TEXT)}


def _kind_of(value: Mapping[str, Any]) -> str | None:
    kinds = {"reward": "reward", "dpo": "preference", "kto": "preference", "grpo": "rl", "rloo": "rl"}
    kind = kinds.get(str(value.get(COMMAND)))
    if kind is not None:
        return kind
    return "rl" if MARKS & value.keys() else "preference" if "beta" in value else None


_ANY_DEFAULTS = {
    **TRAINING_DEFAULTS, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "gradient_checkpointing": True,
    "bf16": "auto",
}  # fmt: skip
_DEFAULTS = {
    **_ANY_DEFAULTS, "learning_rate": 2e-5, "max_length": 1024, "packing": False, "assistant_only_loss": False,
}  # fmt: skip
SYSTEM = System(
    "trl",
    "TRL",
    frozenset({"dataset_name", "dataset_config", "dataset_train_split", "use_peft", "max_length"}),
    {**TRAINING_ARGUMENTS, **_MODEL, **_DATA, **GRPO, **_METHOD, **_PLACEMENT},
    _DEFAULTS,
    command_defaults={
        run: {**_DEFAULTS, "learning_rate": rate}
        for run, rate in {"reward": 1e-4, "dpo": 1e-6, "kto": 1e-6, "preference": 1e-6}.items()
    }
    | {key: {**_ANY_DEFAULTS, **GRPO_DEFAULTS} for key in ("grpo", "rl")},
    finish=_finish,
    kind_of=_kind_of,
)  # fmt: skip
