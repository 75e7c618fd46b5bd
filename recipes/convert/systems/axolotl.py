"""axolotl's YAML."""

import re
from collections.abc import Mapping
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.draft import Draft
from recipes.convert.readers import (
    as_listed,
    const,
    lora_targets,
    module_names,
    number,
    positive,
    real,
    share,
    text,
    truth,
    whole,
)
from recipes.convert.rules import Choice, Section, Table, carried, changed, flag, no_effect, refused, unless
from recipes.convert.system import System
from recipes.convert.systems.axolotl_datasets import read_datasets, read_evaluation, read_pretraining
from recipes.convert.systems.deepspeed import NAMED_FILE
from recipes.convert.systems.transformers_arguments import (
    CHECKPOINTING,
    DIVIDES,
    FASTER,
    LOADING,
    LOGGING,
    MODEL_ARGUMENTS,
    ONE_FORM,
    OPTIMIZER,
    OWN_TEMPLATE,
    OWN_TOKENS,
    PRECISION,
    QUANTISED,
    SCHEDULER,
    STORED,
    TRAINING_ARGUMENTS,
    cadence_by_epoch,
)

_KERNEL = FASTER
_PREFERENCES = ("dpo", "ipo", "kto", "orpo", "simpo")
_SAME_PLUGINS = ("cut_cross_entropy", "liger", "kernels", "swanlab", "expert_parallel", "spectrum_kernels")


def _plugins(value: Any, draft: Any, place: Any) -> None:
    """Plugins that make training faster or log it do not change what is trained."""
    for index, name in enumerate(value if isinstance(value, list) else [value]):
        module = str(name).removeprefix("axolotl.integrations.").partition(".")[0]
        rule = _KERNEL if module in _SAME_PLUGINS else refused("the plugin changes what is trained")
        draft.note((*place, index), name, rule)


def _all_linear(value: Any, draft: Any, place: Any) -> None:
    """Every linear module, those that are named next to it included."""
    draft.retract("lora.target_modules", "lora_target_linear names every linear module")
    draft.note(place, value, carried("lora.target_modules", const("all-linear")))


def _tokens(value: Any, draft: Any, place: Any) -> None:
    """Added tokens; a mapping names special tokens, as `special_tokens` does."""
    rule = changed(OWN_TOKENS) if isinstance(value, Mapping) else carried("new_tokens", as_listed)
    draft.note(place, value, rule)


def _packed_length(value: Any, draft: Any, place: Any) -> None:
    """Rows are packed; in sequences of the same length as the others."""
    if value == draft.get("train.sequence_length"):
        draft.note(place, value, carried("train.packing", const(True)))
    else:
        draft.reject(place, value, "packed sequences have `sequence_length` tokens")


def _at_least(value: Any) -> dict[str, Any]:
    """The filter of rows with fewer tokens."""
    return {"by": "length", "unit": "tokens", "least": positive(value)}


def _unfrozen(value: Any, draft: Any, place: Any) -> None:
    """Patterns of what is trained: all of a vision-language model's language part is a part here."""
    names = [re.sub(r"[\\^$.*]+", ".", str(name)).strip(".") for name in value] if isinstance(value, list) else []
    language = {"model.language_model", "language_model", "lm_head", "embed_tokens", "model.embed_tokens"}
    if names and set(names) <= language and any("language_model" in name for name in names):
        draft.note(place, value, carried("parts", const(["language"])))
    elif any(re.search(r"\[\d*:\d*\]$", str(name)) for name in value or ()):
        draft.reject(place, value, "a parameter is trained whole or not at all")
    else:
        draft.note(place, value, carried("trainable", as_listed))


_MODEL: Table = {
    **MODEL_ARGUMENTS,
    "base_model": carried(q.MODEL, text),
    "base_model_config": changed("the configuration of the model's own folder counts"),
    "base_model_ignore_patterns": no_effect("only safetensors are read"),
    "revision_of_model": carried(q.REVISION, text),
    "cls_model_config": no_effect("the class follows from config.json"),
    "model_type": no_effect("the class follows from config.json"),
    "tokenizer_type": no_effect("the class follows from the tokenizer's files"),
    "processor_type": no_effect("the class follows from the processor's files"),
    "is_*_derived_model": no_effect("the family follows from config.json"),
    "tokenizer_config": changed("the tokenizer of the model's own folder counts"),
    "tokenizer_use_fast": no_effect("tokenizers are the fast ones"),
    "tokenizer_legacy": changed(OWN_TOKENS),
    "tokenizer_use_mistral_common": flag(changed("the tokenizer.json of the model's own folder counts")),
    "trust_remote_code": TRAINING_ARGUMENTS["trust_remote_code"],
    "hf_use_auth_token": no_effect("the hub's own login counts"),
    "special_tokens": {"pad_token": no_effect("padding is in neither loss nor attention"), "*": changed(OWN_TOKENS)},
    "tokens": Section(_tokens),
    "added_tokens_overrides": refused("tokens cannot be renamed"),
    "resize_token_embeddings_to_32x": flag(no_effect("embeddings keep their size")),
    "mean_resizing_embeddings": flag(no_effect("embeddings keep their size")),
    "model_config": {
        "output_router_logits": flag(changed("a model's own configuration decides about its router loss"))
    },
    "overrides_of_model_config": refused("a model's own configuration counts"),
    "overrides_of_model_kwargs": refused("a model's own configuration counts"),
    "reinit_weights": flag(carried("reset_weights", truth)),
    "model_quantization_config": changed(QUANTISED),
    "model_quantization_config_kwargs": changed(QUANTISED),
    "gptq": flag(refused("GPTQ weights are not read; start from the unquantised model")),
    "gptq_*": no_effect("GPTQ weights are not read"),
    "quantize_moe_experts": flag(changed(QUANTISED)),
    "bnb_config_kwargs": ONE_FORM,
    "llama4_linearized_experts": flag(no_effect("experts are transformers' own modules")),
    "use_onebitllms": flag(refused("1.58-bit weights are not trained")),
}
_ADAPTER: Table = {
    "adapter": Choice(
        {
            "lora": carried(q.ADAPTER, const(True)),
            "qlora": carried(q.ADAPTER, const("qlora")),
        },
        refused("must be lora or qlora"),
    ),
    "lora_r": carried("lora.r", positive),
    "lora_alpha": carried("lora.alpha", positive),
    "lora_dropout": carried("lora.dropout", real),
    "lora_target_modules": carried("lora.target_modules", lora_targets),
    "lora_target_linear": flag(Section(_all_linear)),
    "lora_fan_in_fan_out": no_effect("follows from the class of the module"),
    "peft_use_dora": flag(carried("lora.dora", truth)),
    "peft_use_rslora": flag(carried("lora.rank_stabilised", truth)),
    "peft_autocast_adapter_dtype": no_effect("adapters are held as `shard.precision` says"),
    "lora_model_dir": refused("an adapter is not trained on; merge it into the model first"),
    "lora_modules_to_save": carried("lora.modules_to_save", module_names),
    "lora_target_parameters": carried("lora.target_parameters", module_names),
    "lora_*_kernel": _KERNEL,
    "lora_on_cpu": FASTER,
    "loraplus_*": refused("all parameters of an adapter have one learning rate"),
    "peft": {"loftq_config": changed("the base is not quantised, so that adapters have no error of its to start from")},
    "peft_init_lora_weights": Choice(
        {
            True: no_effect("adapters start as LoRA's do"),
            **{name: carried("lora.init", text) for name in ("pissa", "olora")},
            "loftq": changed("the base is not quantised, so that adapters have no error of its to start from"),
        },
        refused("adapters start as LoRA's, PiSSA's or OLoRA's do"),
    ),
    "peft_*": refused("adapters are put on whole linear modules and start as LoRA's do"),
    "relora*": flag(refused("adapters are not merged and started again")),
    "jagged_*": refused("the schedule does not restart"),
    "unfrozen_parameters": Section(_unfrozen),
    "freeze_mm_modules": flag(carried("parts", const(["language"]))),
    "full_finetune": no_effect("every parameter is trained where no adapter is"),
    "lisa_*": refused("every parameter is trained in every step"),
}
_TRAINING: Table = {
    **PRECISION,
    **{
        key: TRAINING_ARGUMENTS[key]
        for key in (
            "learning_rate",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "warmup_ratio",
            "max_steps",
            "save_steps",
            "eval_steps",
            "save_strategy",
            "eval_strategy",
            "evaluation_strategy",
            "seed",
            "gradient_accumulation_steps",
            "gradient_checkpointing_kwargs",
            "group_by_length",
            "neftune_noise_alpha",
            "load_best_model_at_end",
            "resume_from_checkpoint",
            "remove_unused_columns",
            "metric_for_best_model",
            "greater_is_better",
            "dataloader_*",
            "torch_compile",
            "torch_compile_*",
            "ddp_*",
            "accelerator_config",
            "output_dir",
            "save_total_limit",
            "save_only_model",
            "save_safetensors",
            "hub_*",
            "logging_*",
            "include_*",
        )
    },
    "bfloat16": flag(carried("shard.precision", const("bf16"))),
    "float16": PRECISION["fp16"],
    "float32": flag(carried("shard.precision", const("fp32"))),
    "fp8": flag(changed("products are bf16")),
    "fp8_*": no_effect("products are bf16"),
    "adam_eps": carried("train.optimizer.eps", real),
    "optimizer": OPTIMIZER,
    "optim_args": refused("AdamW has betas, eps and weight_decay alone"),
    "lr_scheduler": SCHEDULER,
    "lr_scheduler_kwargs": TRAINING_ARGUMENTS["lr_scheduler_kwargs"],
    "cosine_min_lr_ratio": unless(1, 1.0, then=carried("train.schedule.min_ratio", real)),
    "cosine_constant_lr_ratio": unless(0, 0.0, then=refused("the decay lasts until the end")),
    "lr_quadratic_warmup": flag(changed("the warm-up is linear")),
    "eta_min": changed("the schedule ends at `min_ratio` of the peak, 0 by default"),
    "embedding_lr*": refused("all parameters have one learning rate"),
    "lr_groups": refused("all parameters have one learning rate"),
    "warmup_steps": carried(q.WARMUP_STEPS, number),
    "num_epochs": carried(q.EPOCHS, real),
    "micro_batch_size": carried(q.MICRO_BATCH, positive),
    "batch_size": carried(q.WORKER_BATCH, positive),
    "eval_batch_size": FASTER,
    "saves_per_epoch": cadence_by_epoch(),
    "evals_per_epoch": cadence_by_epoch(),
    "save_first_step": no_effect("saved states come every `save_every` steps"),
    "sequence_len": carried("train.sequence_length", positive),
    "sample_packing": Choice({"auto": carried("train.packing", const(True))}, carried("train.packing", truth)),
    "eval_sample_packing": FASTER,
    "pad_to_sequence_len": FASTER,
    "sample_packing_*": FASTER,
    "curriculum_sampling": flag(changed("rows are read in one order, drawn from the seed")),
    "max_packed_sequence_len": Section(_packed_length),
    "excess_length_strategy": no_effect("longer rows are cut or dropped as docs/data.md says, and counted"),
    "min_sample_len": changed("tokens are counted without the template's", q.SHORTEST, _at_least),
    "train_on_inputs": flag(carried("loss_on", const("all")), carried("loss_on", const("responses"))),
    "val_set_size": carried(q.HELD_OUT_SHARE, share),
    "early_stopping_patience": changed("a stage trains for its whole length"),
    "loss_watchdog_*": no_effect("a non-finite loss stops a stage (`train.max_skipped_steps`)"),
    "gradient_checkpointing": Choice(
        {
            "offload": changed("activations are recomputed, not offloaded", CHECKPOINTING, const(True)),
            "offload_disk": changed("activations are recomputed, not offloaded", CHECKPOINTING, const(True)),
        },
        flag(carried(CHECKPOINTING, truth)),
    ),
    "activation_offloading": Choice({False: no_effect("is off")}, FASTER),
    "qat": refused("quantisation is not trained for"),
    "quantization": refused("models are not quantised"),
    "nvfp4_*": no_effect("models are not quantised"),
    "use_eaft": flag(refused("the loss weighs every token alike")),
    "eaft_*": no_effect("the loss weighs every token alike"),
    "do_causal_lm_eval": flag(changed("held-out perplexity is measured; other suites are an `evaluate` stage")),
    "eval_causal_lm_metrics": LOGGING,
    "eval_max_new_tokens": LOGGING,
    "eval_table_size": LOGGING,
    "debug": LOGGING,
    "diffusion": refused("language models are trained to write the next token"),
    "llmcompressor": refused("weights are not pruned"),
}
_DATA: Table = {
    "datasets": Section(read_datasets),
    "test_datasets": Section(read_evaluation),
    "pretraining_dataset": Section(read_pretraining),
    "chat_template": Choice(
        {"tokenizer_default": carried("template", const("chat"))}, changed(OWN_TEMPLATE, "template", const("chat"))
    ),
    "chat_template_jinja": changed(OWN_TEMPLATE),
    "chat_template_kwargs": changed(OWN_TEMPLATE),
    "eot_tokens": changed("what ends a turn follows from the chat template; `check` says where nothing does"),
    "default_system_message": refused("rows have their own system message, or none"),
    "dataset_exact_deduplication": flag(carried(q.DISTINCT, const({"by": "duplicate"}))),
    "shuffle_merged_datasets": Choice({True: LOADING}, refused("rows are read in an order drawn from the seed")),
    "skip_prepare_dataset": LOADING,
    "dataset_*": LOADING,
    "push_dataset_to_hub": STORED,
    "streaming": LOADING,
    "streaming_*": LOADING,
    "pretrain_multipack_*": LOADING,
    "total_num_tokens": LOADING,
}
_PLACEMENT: Table = {
    "deepspeed": Choice({False: no_effect("is off")}, NAMED_FILE),
    "fsdp": changed("sharded by DeepSpeed's ZeRO 3, which shards the same", "shard.zero", const(3)),
    "fsdp_config": {
        "offload_params": flag(changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))),
        "fsdp_offload_params": flag(
            changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))
        ),
        "activation_checkpointing": flag(carried(CHECKPOINTING, truth)),
        "fsdp_activation_checkpointing": flag(carried(CHECKPOINTING, truth)),
        "*": DIVIDES,
    },
    "fsdp_version": DIVIDES,
    "fsdp_final_state_dict_type": DIVIDES,
    "dp_*_size": DIVIDES,
    "context_parallel_size": DIVIDES,
    "sequence_parallel_degree": DIVIDES,
    "tensor_parallel_size": DIVIDES,
    "expert_parallel_*": DIVIDES,
    "heads_k_stride": DIVIDES,
    "ring_attn_func": DIVIDES,
    "ddp": DIVIDES,
    "device*": DIVIDES,
    "local_rank": DIVIDES,
    "world_size": DIVIDES,
    "use_ray": DIVIDES,
    "ray_num_workers": carried(q.WORKERS, whole),
    "max_memory": DIVIDES,
    "gpu_memory_limit": DIVIDES,
    "experimental_skip_move_to_device": DIVIDES,
}
_NO_EFFECT: Table = {
    "plugins": Section(_plugins),
    "attn_implementation": FASTER,
    "*_attention": FASTER,
    "*_attn_*": FASTER,
    "flash_*": FASTER,
    "liger_*": FASTER,
    "use_kernels": FASTER,
    "use_scattermoe": FASTER,
    "use_sonicmoe": FASTER,
    "use_*_kernels": FASTER,
    "dsv4_*": FASTER,
    "experts_implementation": FASTER,
    "cut_cross_entropy": FASTER,
    "chunked_cross_entropy*": FASTER,
    "tiled_mlp*": FASTER,
    "fused_attn_kernel": FASTER,
    "torchdistx_path": FASTER,
    "gc_*": FASTER,
    "strict": LOADING,
    "auto_resume_from_checkpoints": TRAINING_ARGUMENTS["resume_from_checkpoint"],
    **dict.fromkeys((
        "wandb_*", "use_wandb", "mlflow_*", "use_mlflow", "comet_*", "use_comet", "swanlab_*", "use_swanlab",
        "trackio_*", "use_trackio", "use_tensorboard", "use_otel_metrics", "otel_*", "profiler_*", "gradio_*",
    ), LOGGING),
}  # fmt: skip
_OTHER_STAGES: Table = {
    "rl": Choice(
        {name: carried("loss.name", text) for name in _PREFERENCES},
        refused("an objective that no kind of stage has"),
    ),
    "rl_beta": carried(q.PREFERENCE_WEIGHT, real),
    "orpo_alpha": carried(q.PREFERENCE_WEIGHT, real),
    "simpo_gamma": carried("loss.gamma", real),
    "dpo_label_smoothing": carried("loss.label_smoothing", real),
    "precompute_ref_log_probs": FASTER,
    "dpo_use_liger_kernel": FASTER,
    "dpo_padding_free": FASTER,
    "trl": refused("belongs to another kind of training"),
    "vllm": no_effect("answers are drawn on the training workers"),
    "ebft": refused("belongs to another kind of training"),
    "kto_desirable_weight": carried("loss.desirable_weight", real),
    "kto_undesirable_weight": carried("loss.undesirable_weight", real),
    "dpo_*": refused("belongs to another kind of training"),
    "reward_model": flag(carried(q.KIND, const("reward"))),
    "process_reward_model": flag(refused("a reward model scores whole answers")),
    "center_rewards_coefficient": carried("center_coefficient", real),
    "num_labels": unless(1, then=refused("a reward model gives one number for each answer")),
}


def _finish(draft: Draft) -> None:
    """`rl` names a preference loss."""
    if "loss.name" in draft.values:
        draft.values[q.KIND] = "preference"


def _kind_of(value: Mapping[str, Any]) -> str | None:
    if value.get("reward_model") or value.get("process_reward_model"):
        return "reward"
    named = value.get("rl")
    return None if named is None else "preference" if named in _PREFERENCES else "rl"


SYSTEM = System(
    "axolotl",
    "axolotl",
    frozenset({"base_model", "sequence_len", "num_epochs", "pretraining_dataset", "sample_packing", "val_set_size"}),
    {**_MODEL, **_ADAPTER, **_TRAINING, **_DATA, **_PLACEMENT, **_NO_EFFECT, **_OTHER_STAGES},
    {"num_epochs": 1.0, "micro_batch_size": 1, "sequence_len": 512, "lr_scheduler": "cosine", "sample_packing": False,
     "warmup_ratio": 0.03},
    unless={"warmup_ratio": "warmup_steps", "sample_packing": "max_packed_sequence_len"},
    kind_of=_kind_of,
    finish=_finish,
)  # fmt: skip
