"""LLaMA-Factory's newer YAML (its package `v1`): `peft_config`, `dist_config`, data sets in a separate file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.command_line import COMMAND
from recipes.convert.draft import Draft
from recipes.convert.readers import const, lora_targets, one_of, positive, real, text, truth, whole
from recipes.convert.rows import find_source, merge_sources
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
from recipes.convert.source_text import read_source
from recipes.convert.system import System
from recipes.convert.systems.deepspeed import NAMED_FILE
from recipes.convert.systems.transformers_arguments import (
    CHECKPOINTING,
    DIVIDES,
    FASTER,
    LOADING,
    LOGGING,
    NO_REMOTE_CODE,
    OWN_TEMPLATE,
    QUANTISED,
    RESUMES,
    STORED,
    cadence,
)
from recipes.errors import RecipeError

_ADAPTERS = "every parameter is trained, or LoRA adapters are"
_ALPACA = {"prompt": "{instruction}\n{input}", "completion": "output"}


def _rows(target: str) -> Section:
    """Rows of the data sets that a file lists."""

    def read(value: Any, draft: Draft, place: Place) -> None:
        try:
            listed = _listed(text(value), draft)
            merged = merge_sources([_source(name, item, draft, place) for name, item in listed.items()])
        except Unfit as error:
            draft.reject(place, value, str(error), error.code)
            return
        draft.note(place, value, carried(target, const(merged)))

    return Section(read)


def _listed(written: str, draft: Draft) -> dict[str, Mapping[str, Any]]:
    """Data sets by name: those of a YAML file, or the one data set that is named."""
    if Path(written).suffix not in (".yaml", ".yml"):
        return {written: {"path": written}}
    file = next((place for place in draft.places(written) if place.is_file()), None)
    if file is None:
        raise Unfit(f"no such file under {draft.working_dir}; --folder names the folder in which LLaMA-Factory is run")
    try:
        found = read_source(file, draft.working_dir).value
    except RecipeError as error:
        raise Unfit(str(error)) from None
    if not all(isinstance(item, Mapping) for item in found.values()):
        raise Unfit(f"{file} must map names to data sets")
    return found


def _source(name: str, said: Mapping[str, Any], draft: Draft, place: Place) -> dict[str, Any]:
    known = {"path", "source", "split", "converter", "size", "weight", "streaming"}
    if unknown := sorted(set(said) - known):
        raise Unfit(f"data set {name} has {', '.join(unknown)}; a source has {', '.join(sorted(known))}")
    if unread := [key for key in ("size", "weight") if key in said]:
        draft.note(
            (*place, name), None, changed(f"every row is read once in an epoch, whatever {' and '.join(unread)} says")
        )
    source = find_source(draft, text(said.get("path")), split=said.get("split"))
    converter = said.get("converter")
    if converter not in (None, "alpaca", "sharegpt", "pair"):
        raise Unfit(f"data set {name}: converter {converter} is no layout that is known here: alpaca, sharegpt, pair")
    return {**source, "columns": _ALPACA} if converter == "alpaca" else source


TABLE: Table = {
    COMMAND: Choice(
        {
            "sft": carried(q.KIND, const("finetune")),
            "rm": carried(q.KIND, const("reward")),
            "dpo": carried(q.KIND, const("preference")),
        },
        refused("must be sft, rm or dpo"),
    ),
    "model": carried(q.MODEL, text),
    "custom_chat_template": changed(OWN_TEMPLATE),
    "trust_remote_code": NO_REMOTE_CODE,
    "flash_attn": FASTER,
    "model_class": unless("llm", then=refused("the kind of stage says what a model is for")),
    "init_config": DIVIDES,
    "peft_config": {
        "name": Choice({"lora": carried(q.ADAPTER, const(True))}, refused(_ADAPTERS)),
        "r": carried("lora.r", positive),
        "lora_alpha": carried("lora.alpha", positive),
        "lora_dropout": carried("lora.dropout", real),
        "target_modules": carried("lora.target_modules", lora_targets),
        "use_dora": flag(carried("lora.dora", truth)),
        "use_rslora": flag(carried("lora.rank_stabilised", truth)),
        "adapter_name_or_path": refused("an adapter is not trained on; merge it into the model first"),
        "export_*": refused("merging and exporting is `trainwright store export`"),
        "*": refused(_ADAPTERS),
    },
    "kernel_config": FASTER,
    "quant_config": changed(QUANTISED),
    "dist_config": {
        "name": Choice(
            {
                "fsdp2": changed("sharded by DeepSpeed's ZeRO 3, which shards the same", "shard.zero", const(3)),
                "deepspeed": no_effect("`config_file` says how"),
            },
            changed("sharded by DeepSpeed's ZeRO 3", "shard.zero", const(3)),
        ),
        "config_file": NAMED_FILE,
        "*": DIVIDES,
    },
    "optim_config": {
        "name": unless("adamw", then=refused("another optimiser than AdamW")),
        "*": refused("belongs to it"),
    },
    "lr_scheduler_config": {
        "name": carried("train.schedule.name", one_of({name: name for name in ("constant", "linear", "cosine")})),
        "warmup_ratio": carried(q.WARMUP_SHARE, real),
        "*": refused("the schedule has a name and a warm-up"),
    },
    "train_dataset": _rows("data"),
    "eval_dataset": _rows("evaluation"),
    "micro_batch_size": carried(q.MICRO_BATCH, positive),
    "global_batch_size": carried("train.global_batch", positive),
    "cutoff_len": carried("train.sequence_length", positive),
    "learning_rate": carried("train.optimizer.lr", real),
    "num_train_epochs": carried(q.EPOCHS, real),
    "max_steps": carried(q.STEPS, whole),
    "max_grad_norm": carried("train.gradient_clipping", real),
    "bf16": flag(carried("shard.precision", const("bf16"))),
    "enable_activation_checkpointing": flag(carried(CHECKPOINTING, truth)),
    "batching_strategy": Choice(
        {"normal": FASTER, "padding_free": FASTER},
        changed("a step has a fixed number of rows, not of tokens"),
    ),
    "batching_workers": LOADING,
    "seed": carried(q.SEED, whole),
    "full_determinism": FASTER,
    "resume_from_checkpoint": RESUMES,
    "save_steps": cadence("train.save_every"),
    "save_*": STORED,
    "output_dir": STORED,
    "logging_steps": LOGGING,
    "pref_loss": carried("loss.name", one_of({"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo"})),
    "pref_beta": carried(q.PREFERENCE_WEIGHT, real),
    "pref_ftx": unless(0, 0.0, then=refused("no other loss is added to a preference loss")),
    "simpo_gamma": carried("loss.gamma", real),
    "dpo_label_smoothing": carried("loss.label_smoothing", real),
    "ld_alpha": refused("every token of an answer weighs the same"),
    **dict.fromkeys(("dp_size", "cp_*", "mp_*", "dist_timeout"), DIVIDES),
    **dict.fromkeys(("sample_backend", "max_new_tokens"), no_effect("answers are drawn by `trainwright sample`")),
}


def _finish(draft: Draft) -> None:
    """Which command reads a file, it does not say."""
    if q.KIND not in draft.values:
        draft.values[q.KIND] = "finetune"
        draft.comments["kind"] = "the file does not say which command reads it; --from llama-factory-v1:dpo does"
    draft.values.setdefault("train.packing", False)


SYSTEM = System(
    "llama-factory-v1",
    "LLaMA-Factory v1",
    frozenset({"train_dataset", "peft_config", "dist_config", "kernel_config", "model_class"}),
    TABLE,
    {"learning_rate": 1e-4, "num_train_epochs": 3, "micro_batch_size": 1, "cutoff_len": 2048,
     "enable_activation_checkpointing": True, "lr_scheduler_config": {"name": "constant"}, "seed": 42},
    trains=lambda value: "train_dataset" in value,
    finish=_finish,
)  # fmt: skip
