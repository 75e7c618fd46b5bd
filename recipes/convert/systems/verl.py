"""verl's YAML and Hydra overrides: `verl.trainer.fsdp_sft_trainer` and `verl.trainer.sft_trainer`."""

from typing import Any

from recipes.convert import quantities as q
from recipes.convert.command_line import COMMAND
from recipes.convert.draft import Draft
from recipes.convert.readers import const, lora_targets, pair, positive, real, text, truth, whole
from recipes.convert.rows import file_source
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
from recipes.convert.system import System
from recipes.convert.systems.transformers_arguments import (
    CHECKPOINTING,
    DIVIDES,
    FASTER,
    LOADING,
    LOGGING,
    NO_REMOTE_CODE,
    OWN_TEMPLATE,
    RESUMES,
    STORED,
)
from recipes.convert.systems.verl_ppo import BATCH, DEFAULTS, PPO, finish_ppo

_PROMPT, _RESPONSE, _PROMPT_KEYS, _RESPONSE_KEYS = "@prompt", "@response", "@prompt_keys", "@response_keys"
_CHATS, _MESSAGES, _LIMIT = "@chats", "@messages", "@limit"
_LR = "train.optimizer.lr"


def _keys(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
        raise Unfit("must be a list of keys")
    return value


def _rows(target: str) -> Section:
    """Parquet files, in the columns that other keys name."""

    def read(value: Any, draft: Draft, place: Place) -> None:
        files = [value] if isinstance(value, str) else value
        try:
            if not isinstance(files, list) or not files:
                raise Unfit("must be a file or a list of files")
            source = file_source(draft, [text(file) for file in files])
            columns = _columns(draft)
        except Unfit as error:
            draft.reject(place, value, str(error), error.code)
            return
        place_of = "prompts" if target == "data" and draft.get(q.KIND) == "rl" else target
        limit = {"limit": draft.get(_LIMIT)} if target == "data" and draft.get(_LIMIT) else {}
        draft.note(
            place, value, carried(place_of, const({**source, **({"columns": columns} if columns else {}), **limit}))
        )

    return Section(read)


def _columns(draft: Draft) -> dict[str, str]:
    if draft.get(q.KIND) == "rl":
        found = {"prompt": _inside(draft.get(_PROMPT, "prompt"), draft.get(_PROMPT_KEYS))}
    elif draft.get(_CHATS):
        found = {"messages": draft.get(_MESSAGES, "messages")}
    else:
        found = {
            "prompt": _inside(draft.get(_PROMPT, "question"), draft.get(_PROMPT_KEYS)),
            "completion": _inside(draft.get(_RESPONSE, "answer"), draft.get(_RESPONSE_KEYS)),
        }
    return {column: own for column, own in found.items() if column != own}


def _inside(column: str, keys: list[str] | None) -> str:
    return ".".join([column, *(keys or [])])


_TRUNCATIONS = {
    "right": no_effect("longer rows lose their end, and are counted"),
    "error": changed("longer rows are cut or dropped, and counted; see `max_dropped`"),
}


def _truncate(value: Any, draft: Draft, place: Place) -> None:
    """Where a long row is cut; of prompts for drawn answers, none is."""
    if draft.get(q.KIND) == "rl":
        rule = changed("longer prompts are dropped whole, and counted; see `max_dropped`")
    else:
        rule = _TRUNCATIONS.get(str(value), refused("longer rows lose their end"))
    draft.note(place, value, rule)


_DATA: Table = {
    "data.train_files": _rows("data"),
    "data.max_prompt_length": carried("rollout.max_prompt_tokens", positive),
    "data.max_response_length": carried("rollout.max_new_tokens", positive),
    "data.filter_overlong_prompts": no_effect("longer prompts are dropped and counted"),
    "data.reward_fn_key": no_effect("the rows' columns are handed to the reward"),
    "data.val_files": _rows("evaluation"),
    "data.train_max_samples": unless(-1, then=carried(_LIMIT, positive)),
    "data.val_max_samples": no_effect("`train.evaluation_rows` says how many rows an evaluation takes"),
    "data.train_batch_size": carried(BATCH, positive),
    "data.micro_batch_size": no_effect("verl reads micro_batch_size_per_gpu"),
    "data.micro_batch_size_per_gpu": carried(q.MICRO_BATCH, positive),
    "data.prompt_key": carried(_PROMPT, text),
    "data.response_key": carried(_RESPONSE, text),
    "data.prompt_dict_keys": carried(_PROMPT_KEYS, _keys),
    "data.response_dict_keys": carried(_RESPONSE_KEYS, _keys),
    "data.multiturn.enable": flag(carried(_CHATS, truth)),
    "data.multiturn.messages_key": carried(_MESSAGES, text),
    "data.messages_key": carried(_MESSAGES, text),
    "data.multiturn.*": changed(OWN_TEMPLATE),
    "data.max_length": carried("train.sequence_length", positive),
    "data.truncation": Section(_truncate, waits=False),
    "data.chat_template": changed(OWN_TEMPLATE),
    "data.apply_chat_template_kwargs": changed(OWN_TEMPLATE),
    "data.ignore_input_ids_mismatch": LOADING,
    "data.pad_mode": FASTER,
    "data.use_dynamic_bsz": FASTER,
    "data.max_token_len_per_gpu": FASTER,
    "data.custom_cls.name": no_effect("belongs to data.custom_cls.path"),
    "data.custom_cls.*": refused("rows are read by a source; a class of yours is not run"),
    "data.*": LOADING,
}
_MODEL: Table = {
    "model.partial_pretrain": carried(q.MODEL, text),
    "model.path": carried(q.MODEL, text),
    "model.trust_remote_code": NO_REMOTE_CODE,
    "model.enable_gradient_checkpointing": flag(carried(CHECKPOINTING, truth)),
    "model.lora_rank": unless(0, then=carried("lora.r", positive)),
    "model.lora_alpha": carried("lora.alpha", positive),
    "model.target_modules": carried("lora.target_modules", lora_targets),
    "model.fsdp_config.cpu_offload": flag(
        changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))
    ),
    "model.fsdp_config.offload_params": flag(
        changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))
    ),
    "model.fsdp_config.model_dtype": Choice(
        {name: no_effect("master weights are fp32") for name in ("fp32", "float32")},
        changed("fp32 master weights are kept"),
    ),
    "model.strategy": no_effect("one torch loop or DeepSpeed, as `shard` says"),
    "model.external_lib": refused("code of yours is not imported"),
    "model.*": DIVIDES,
}
_OPTIMIZER: Table = {
    "optim": DIVIDES,
    "optim.lr": carried(_LR, real),
    "optim.betas": carried("train.optimizer.betas", pair),
    "optim.weight_decay": carried("train.optimizer.weight_decay", real),
    "optim.lr_warmup_steps_ratio": carried(q.WARMUP_SHARE, real),
    "optim.warmup_steps_ratio": carried(q.WARMUP_SHARE, real),
    "optim.lr_warmup_steps": unless(-1, then=carried(q.WARMUP_STEPS, whole)),
    "optim.clip_grad": carried("train.gradient_clipping", real),
    "optim.min_lr_ratio": carried("train.schedule.min_ratio", real),
    **dict.fromkeys(
        ("optim.lr_scheduler", "optim.warmup_style", "optim.lr_scheduler_type"),
        Choice(
            {name: carried("train.schedule.name", const(name)) for name in ("cosine", "constant")},
            refused("must be cosine or constant"),
        ),
    ),
}
_TRAINER: Table = {
    COMMAND: Choice(
        {
            "fsdp_sft_trainer": carried(q.KIND, const("finetune")),
            "sft_trainer": carried(q.KIND, const("finetune")),
            "main_ppo": carried(q.KIND, const("rl")),
        },
        refused("must be fsdp_sft_trainer, sft_trainer or main_ppo"),
    ),
    "trainer.total_epochs": carried(q.EPOCHS, real),
    "trainer.total_training_steps": carried(q.STEPS, whole),
    "trainer.n_gpus_per_node": carried(q.WORKERS, positive),
    "trainer.nnodes": carried(q.NODES, positive),
    "trainer.seed": carried(q.SEED, whole),
    "trainer.save_freq": Choice({-1: no_effect("saved at the end, and every `save_every` steps"),
                                 "after_each_epoch": no_effect("saved at the end, and every `save_every` steps")},
                                carried("train.save_every", whole)),
    "trainer.test_freq": Choice({-1: no_effect("the end is always evaluated where rows are held out"),
                                 "after_each_epoch": no_effect("the end is always evaluated where rows are held out")},
                                carried("train.evaluate_every", whole)),
    "trainer.resume_*": RESUMES,
    "trainer.default_*": STORED,
    "trainer.checkpoint.*": STORED,
    "trainer.max_ckpt_to_keep": STORED,
    "trainer.device": DIVIDES,
    "trainer.*": LOGGING,
    "checkpoint.*": STORED,
    "config-path": LOADING,
    "config-name": Choice(
        {f"ppo_{name}trainer{suffix}": DIVIDES for name in ("", "megatron_") for suffix in ("", ".yaml")},
        changed("the keys of that file are not read: convert it, or write them as overrides"),
    ),
    "engine": DIVIDES,
    "engine.*": DIVIDES,
    "ulysses_sequence_parallel_size": DIVIDES,
    "use_remove_padding": FASTER,
    "profiler.*": LOGGING,
}  # fmt: skip


def _finish(draft: Draft) -> None:
    """Adapters by their rank; rows in their own number in a batch."""
    draft.values[q.ADAPTER] = "lora.r" in draft.values
    if draft.get("rollout.prompts_per_iteration") is None and any(key.startswith("algorithm.") for key in draft.values):
        draft.values[q.KIND] = "rl"
    batch = draft.values.pop(BATCH, None)
    if draft.get(q.KIND) == "rl":
        if batch is not None:
            draft.values["rollout.prompts_per_iteration"] = batch
        finish_ppo(draft)
    else:
        draft.retract("rollout.", "answers are not drawn")
        if batch is not None:
            draft.values["train.global_batch"] = batch
    if draft.get(q.KIND, "finetune") == "finetune":
        draft.values.setdefault(q.KIND, "finetune")
        draft.values.setdefault("train.packing", False)


SYSTEM = System(
    "verl",
    "verl",
    frozenset({"actor_rollout_ref", "data.train_files", "model.partial_pretrain", "trainer.total_epochs"}),
    {**_DATA, **_MODEL, **_OPTIMIZER, **_TRAINER, **PPO},
    {"data.train_batch_size": 256, "data.micro_batch_size_per_gpu": 4, "data.max_length": 1024,
     "data.truncation": "error", "model.enable_gradient_checkpointing": True, "optim.lr": 1e-5, "optim.betas":
     [0.9, 0.95], "optim.weight_decay": 0.01, "optim.lr_warmup_steps_ratio": 0.1, "optim.clip_grad": 1.0,
     "optim.lr_scheduler": "cosine", "trainer.total_epochs": 4},
    command_defaults={"main_ppo": DEFAULTS, "rl": DEFAULTS},
    is_flat=True,
    finish=_finish,
    kind_of=lambda value: "rl" if value.get(COMMAND) == "main_ppo" or any(
        str(key).startswith("actor_rollout_ref") for key in value
    ) else None,
)  # fmt: skip
