"""OpenRLHF's command lines: `openrlhf.cli.train_sft`, `train_rm`, `train_dpo`; with their old, flat arguments too."""

from collections.abc import Mapping
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.command_line import COMMAND
from recipes.convert.draft import Draft
from recipes.convert.readers import const, lora_targets, pair, positive, real, text, truth, whole
from recipes.convert.reinforcement import split_length
from recipes.convert.rows import find_source
from recipes.convert.rules import (
    Choice,
    Entry,
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
from recipes.convert.systems.deepspeed import ZERO
from recipes.convert.systems.openrlhf_ppo import DEFAULTS, PPO, finish_ppo
from recipes.convert.systems.transformers_arguments import (
    CHECKPOINTING,
    DIVIDES,
    FASTER,
    IN_4_BITS,
    LOADING,
    LOGGING,
    OWN_TEMPLATE,
    RESUMES,
    STORED,
)

_INPUT, _OUTPUT, _PROMPT, _CHOSEN, _REJECTED = "@input", "@output", "@prompt", "@chosen", "@rejected"
_SPLIT, _LIMIT, _TEMPLATE, _CHATS, _EVALUATION_SPLIT = "@split", "@limit", "@template", "@chats", "@evaluation_split"
PLAIN_TEMPLATE = "User: {}\nAssistant: "
"""How prompts are written without a chat template."""


def _rows(target: str) -> Section:
    """Rows of a data set's name, in the columns that other arguments name."""

    def read(value: Any, draft: Draft, place: Place) -> None:
        split = draft.get(_EVALUATION_SPLIT if target == "evaluation" else _SPLIT)
        try:
            names = text(value).split(",")
            if len(names) > 1:
                raise Unfit("a stage reads one source; name one data set")
            source = find_source(draft, names[0].strip(), split=split)
        except Unfit as error:
            draft.reject(place, value, str(error), error.code)
            return
        columns = _columns(draft)
        limit = {"limit": draft.get(_LIMIT)} if target != "evaluation" and draft.get(_LIMIT) else {}
        draft.note(
            place, value, carried(target, const({**source, **({"columns": columns} if columns else {}), **limit}))
        )

    return Section(read)


def _columns(draft: Draft) -> dict[str, str]:
    if draft.get(q.KIND) in ("reward", "preference"):
        named = {"prompt": draft.get(_PROMPT), "chosen": draft.get(_CHOSEN), "rejected": draft.get(_REJECTED)}
    elif draft.get(q.KIND) == "rl":
        named = {"prompt": _prompt(draft)}
    elif draft.get(q.KIND) == "pretrain":
        named = {"text": draft.get(_INPUT)}
    elif draft.get(_CHATS):
        named = {"messages": draft.get(_INPUT)}
    else:
        named = {"prompt": _prompt(draft), "completion": draft.get(_OUTPUT)}
    return {column: own for column, own in named.items() if own is not None and own != column}


def _prompt(draft: Draft) -> str | None:
    """The column of the prompt, inside OpenRLHF's template where no chat template is applied."""
    column: str | None = draft.get(_INPUT)
    template = draft.get(_TEMPLATE)
    if column is None or draft.get("template") == "chat" or not template:
        return column
    return str(template).replace("\\n", "\n").replace("{}", "{" + column + "}")


_COMMON: Table = {
    COMMAND: Choice(
        {
            "train_sft": carried(q.KIND, const("finetune")),
            "train_rm": carried(q.KIND, const("reward")),
            "train_dpo": carried(q.KIND, const("preference")),
            "train_ppo_ray": carried(q.KIND, const("rl")),
        },
        refused("must be train_sft, train_rm, train_dpo or train_ppo_ray"),
    ),
    "ckpt.output_dir": STORED,
    "ckpt.save_hf": STORED,
    "ckpt.load_enable": RESUMES,
    "ckpt.path": RESUMES,
    "ckpt.save_steps": Choice(
        {-1: no_effect("saved at the end, and every `save_every` steps")}, carried("train.save_every", whole)
    ),
    "ckpt.*": STORED,
    "eval.steps": Choice(
        {-1: no_effect("the end is always evaluated where rows are held out")}, carried("train.evaluate_every", whole)
    ),
    "eval.dataset": _rows("evaluation"),
    "eval.split": carried(_EVALUATION_SPLIT, text),
    "logger.*": LOGGING,
    "local_rank": DIVIDES,
    "use_ms": flag(refused("models come from the Hugging Face hub")),
    "ds.zero_stage": ZERO,
    "ds.param_dtype": Choice(
        {"bf16": carried("shard.precision", const("bf16"))},
        changed("fp16 with loss scaling is not there; auto is bf16 where the GPU has it, else fp32"),
    ),
    "ds.adam_offload": flag(carried("shard.offload", const("cpu"))),
    "ds.load_in_4bit": IN_4_BITS,
    "ds.lora.rank": unless(0, then=carried("lora.r", positive)),
    "ds.lora.alpha": carried("lora.alpha", positive),
    "ds.lora.dropout": carried("lora.dropout", real),
    "ds.lora.target_modules": carried("lora.target_modules", lora_targets),
    "ds.packing_samples": FASTER,
    "ds.*": DIVIDES,
    "model.model_name_or_path": carried(q.MODEL, text),
    "model.gradient_checkpointing_enable": flag(carried(CHECKPOINTING, truth)),
    "model.gradient_checkpointing_reentrant": FASTER,
    "model.aux_loss_coef": unless(0, 0.0, then=changed("a model's own configuration decides about its router loss")),
    "model.pretrain_mode_enable": flag(changed("documents are learnt whole", "loss_on", const("all"))),
    "model.compute_fp32_loss_enable": FASTER,
    "train.batch_size": carried("train.global_batch", positive),
    "train.micro_batch_size": carried(q.MICRO_BATCH, positive),
    "train.max_epochs": carried(q.EPOCHS, real),
    "train.seed": carried(q.SEED, whole),
    "train.full_determinism_enable": FASTER,
    "adam.lr": carried("train.optimizer.lr", real),
    "adam.betas": carried("train.optimizer.betas", pair),
    "adam.eps": carried("train.optimizer.eps", real),
    "adam.weight_decay": carried("train.optimizer.weight_decay", real),
    "optim": unless("adam", then=refused("another optimiser than AdamW")),
    "muon.*": no_effect("belongs to another optimiser"),
    "lr_scheduler": Choice(
        {
            "cosine_with_min_lr": carried("train.schedule.name", const("cosine")),
            "cosine": carried("train.schedule.name", const("cosine")),
            "linear": carried("train.schedule.name", const("linear")),
            "constant": carried("train.schedule.name", const("constant")),
            "constant_with_warmup": carried("train.schedule.name", const("constant")),
        },
        refused("must be cosine, cosine_with_min_lr, linear or constant"),
    ),
    "lr_warmup_ratio": carried(q.WARMUP_SHARE, real),
    "min_lr_ratio": carried("train.schedule.min_ratio", real),
    "max_norm": carried("train.gradient_clipping", real),
    "data.dataset": _rows("data"),
    "data.prompt_dataset": _rows("prompts"),
    "data.prompt_split": carried(_SPLIT, text),
    "data.dataset_split": carried(_SPLIT, text),
    "data.dataset_probs": refused("a stage reads one source"),
    "data.max_samples": carried(_LIMIT, positive),
    "data.max_len": carried("train.sequence_length", positive),
    "data.input_key": carried(_INPUT, text),
    "data.output_key": carried(_OUTPUT, text),
    "data.prompt_key": carried(_PROMPT, text),
    "data.chosen_key": carried(_CHOSEN, text),
    "data.rejected_key": carried(_REJECTED, text),
    "data.multiturn": flag(carried(_CHATS, truth)),
    "data.apply_chat_template": flag(carried("template", const("chat"))),
    "data.input_template": carried(_TEMPLATE),
    "data.tokenizer_chat_template": changed(OWN_TEMPLATE),
    "data.dataloader_num_workers": LOADING,
    "data.disable_fast_tokenizer": flag(no_effect("tokenizers are the fast ones")),
}
_PREFERENCES: Table = {
    "model.beta": carried(q.PREFERENCE_WEIGHT, real),
    "model.ipo_enable": flag(carried("loss.name", const("ipo"))),
    "model.label_smoothing": unless(0, 0.0, then=carried("loss.label_smoothing", real)),
    "model.nll_loss_coef": unless(0, 0.0, then=refused("no other loss is added to a preference loss")),
    "model.loss_type": unless("sigmoid", then=refused("a reward model has the logistic loss of Bradley and Terry")),
    "model.margin_loss_enable": flag(refused("pairs have no margins")),
    "ref.offload": FASTER,
    "ref.model_name_or_path": refused("the reference is the model that the stage starts from"),
}
_OLD = {
    "pretrain": "model.model_name_or_path", "save_path": "ckpt.output_dir", "ckpt_path": "ckpt.path",
    "save_steps": "ckpt.save_steps", "load_checkpoint": "ckpt.load_enable", "logging_steps":
    "logger.logging_steps", "eval_steps": "eval.steps", "train_batch_size": "train.batch_size",
    "micro_train_batch_size": "train.micro_batch_size", "max_epochs": "train.max_epochs", "seed": "train.seed",
    "zero_stage": "ds.zero_stage", "adam_offload": "ds.adam_offload", "flash_attn": "ds.attn_implementation",
    "learning_rate": "adam.lr", "adam_betas": "adam.betas", "l2": "adam.weight_decay", "gradient_checkpointing":
    "model.gradient_checkpointing_enable", "packing_samples": "ds.packing_samples", "load_in_4bit":
    "ds.load_in_4bit", "lora_rank": "ds.lora.rank", "lora_alpha": "ds.lora.alpha", "lora_dropout":
    "ds.lora.dropout", "target_modules": "ds.lora.target_modules", "dataset": "data.dataset", "dataset_probs":
    "data.dataset_probs", "max_samples": "data.max_samples", "max_len": "data.max_len", "input_key":
    "data.input_key", "output_key": "data.output_key", "prompt_key": "data.prompt_key", "chosen_key":
    "data.chosen_key", "rejected_key": "data.rejected_key", "multiturn": "data.multiturn",
    "apply_chat_template": "data.apply_chat_template", "input_template": "data.input_template", "use_wandb":
    "logger.wandb", "wandb_project": "logger.wandb", "wandb_run_name": "logger.wandb", "beta": "model.beta",
    "ipo": "model.ipo_enable", "label_smoothing": "model.label_smoothing", "nll_loss_coef":
    "model.nll_loss_coef", "aux_loss_coef": "model.aux_loss_coef", "pretrain_mode":
    "model.pretrain_mode_enable", "ref_offload": "ref.offload",
}  # fmt: skip
"""Arguments before they had groups, and what they are called now."""


def _entry(name: str) -> Entry:
    table = {**_COMMON, **_PREFERENCES}
    return table[name] if name in table else table[f"{name.partition('.')[0]}.*"]


def _finish(draft: Draft) -> None:
    """Adapters by their rank; rows that are put to the model as they are."""
    draft.values[q.ADAPTER] = "lora.r" in draft.values
    if draft.get(q.KIND) == "rl":
        draft.values[q.PASSES] = draft.values.pop(q.EPOCHS, 1)
        draft.values[q.EPOCHS] = draft.values.pop(q.EPISODES, 1)
        draft.values.setdefault("template", "none")
        split_length(draft, draft.get("train.sequence_length", 2048))
        finish_ppo(draft)
    if draft.get("loss_on") == "all":
        draft.values[q.KIND] = "finetune" if draft.get(q.ADAPTER) else "pretrain"
    if draft.get(q.KIND) == "preference":
        draft.values.setdefault("loss.name", "dpo")
    if draft.get(q.KIND) == "finetune" and not draft.get(_CHATS):
        draft.values.setdefault("template", "none")
        draft.comments["template"] = "none: OpenRLHF's own words stand around the prompt, in `columns`"
    if draft.get(q.KIND) == "finetune":
        draft.values.setdefault("train.packing", False)


_SFT: Mapping[str, Any] = {
    "train.batch_size": 128, "train.micro_batch_size": 8, "train.max_epochs": 2, "train.seed": 42, "ds.zero_stage": 2,
    "ds.param_dtype": "bf16", "adam.lr": 5e-6, "adam.betas": [0.9, 0.95], "lr_scheduler": "cosine_with_min_lr",
    "lr_warmup_ratio": 0.03, "min_lr_ratio": 0.1, "data.max_len": 2048, "data.input_key": "input",
    "data.input_template": PLAIN_TEMPLATE,
}  # fmt: skip
_PAIRS = {**_SFT, "train.max_epochs": 1, "train.micro_batch_size": 1, "data.max_len": 512, "data.input_template": None}
SYSTEM = System(
    "openrlhf",
    "OpenRLHF",
    frozenset({"ckpt.output_dir", "ds.zero_stage", "adam.lr", "train.batch_size", "micro_train_batch_size"}),
    {**PPO, **_COMMON, **_PREFERENCES, **{old: _entry(name) for old, name in _OLD.items()},
     "bf16": flag(carried("shard.precision", const("bf16")))},
    _SFT,
    command_defaults={"train_ppo_ray": DEFAULTS, "train_rm": {**_PAIRS, "adam.lr": 9e-6},
                      "train_dpo": {**_PAIRS, "adam.lr": 1e-5, "train.micro_batch_size": 8, "model.beta": 0.1}},
    former_names=_OLD,
    finish=_finish,
    kind_of=lambda value: {"train_rm": "reward", "train_dpo": "preference", "train_ppo_ray": "rl"}.get(
        str(value.get(COMMAND))
    ),
)  # fmt: skip
