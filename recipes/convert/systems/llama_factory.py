"""LLaMA-Factory's YAML."""

from collections.abc import Mapping
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.draft import Draft
from recipes.convert.readers import (
    const,
    lora_targets,
    module_names,
    one_of,
    positive,
    real,
    share,
    shares,
    text,
    texts,
    truth,
)
from recipes.convert.rules import Choice, Section, Table, carried, changed, flag, no_effect, refused, unless
from recipes.convert.system import System
from recipes.convert.systems.deepspeed import NAMED_FILE
from recipes.convert.systems.llama_factory_datasets import (
    DATASET_DIR,
    DOCUMENTS,
    LIMIT,
    SHARES,
    UNTIL,
    read_evaluation,
    read_training,
)
from recipes.convert.systems.transformers_arguments import (
    CHECKPOINTING,
    DIVIDES,
    FASTER,
    IN_4_BITS,
    IN_8_BITS,
    LOADING,
    LOGGING,
    MODEL_ARGUMENTS,
    ONE_FORM,
    OWN_TEMPLATE,
    QUANTISED,
    TRAINING_ARGUMENTS,
    TRAINING_DEFAULTS,
)

_OTHER_OPTIMIZER = refused("another optimiser than AdamW")
_OTHER_LOSS = refused("the loss weighs every token alike")
_EXPORTS = refused("merging and exporting is `trainwright store export`")
_SERVES = refused("answers are drawn by `trainwright sample`")
_PIXELS = changed("images are sized as the model's own processor says")
_UNUSED = no_effect("belongs to something that is off")

_METHOD: Table = {
    "stage": Choice(
        {
            "sft": carried(q.KIND, const("finetune")),
            "pt": carried(q.KIND, const("pretrain")),
            "rm": carried(q.KIND, const("reward")),
            "dpo": carried(q.KIND, const("preference")),
            "kto": carried("loss.name", const("kto")),
        },
        refused("an objective that no kind of stage has; there are pt, sft, rm, dpo and kto"),
    ),
    "finetuning_type": Choice(
        {
            "lora": carried(q.ADAPTER, const(True)),
            "full": no_effect("every parameter is trained where no adapter is"),
        },
        refused("every parameter is trained, or LoRA adapters are"),
    ),
    "lora_rank": carried("lora.r", positive),
    "lora_alpha": carried("lora.alpha", positive),
    "lora_dropout": carried("lora.dropout", real),
    "lora_target": carried("lora.target_modules", lora_targets),
    "use_rslora": flag(carried("lora.rank_stabilised", truth)),
    "use_dora": flag(carried("lora.dora", truth)),
    "pissa_init": flag(carried("lora.init", const("pissa"))),
    "pissa_iter": unless(-1, then=carried("lora.init_iterations", positive)),
    "pissa_convert": no_effect("what is saved is always a LoRA on the base as it was"),
    "loraplus_*": refused("all parameters of an adapter have one learning rate"),
    "additional_target": carried("lora.modules_to_save", module_names),
    "adapter_name_or_path": refused("an adapter is not trained on; merge it into the model first"),
    "create_new_adapter": flag(refused("an adapter is not trained on; merge it into the model first")),
    "freeze_trainable_*": refused("every parameter is trained, or LoRA adapters are"),
    "freeze_extra_modules": refused("every parameter is trained, or LoRA adapters are"),
    "freeze_vision_tower": no_effect("`parts` says what of a vision-language model learns"),
    "freeze_multi_modal_projector": no_effect("`parts` says what of a vision-language model learns"),
    "freeze_language_model": flag(refused("write `parts` for this: projector, vision")),
    "use_llama_pro": flag(refused("every parameter is trained, or LoRA adapters are")),
    "oft_*": no_effect("belongs to finetuning_type oft"),
    **{f"use_{name}": flag(_OTHER_OPTIMIZER) for name in ("galore", "apollo", "badam", "adam_mini", "muon")},
    **{f"{name}_*": _UNUSED for name in ("galore", "apollo", "badam", "asft", "eaft")},
    **{f"use_{name}_loss": flag(_OTHER_LOSS) for name in ("dft", "asft", "eaft")},
    "mixture_of_depths": refused("every layer sees every token"),
    "pref_beta": carried(q.PREFERENCE_WEIGHT, real),
    "pref_loss": carried(
        "loss.name", one_of({"sigmoid": "dpo", **{name: name for name in ("hinge", "ipo", "orpo", "simpo")}})
    ),
    "pref_ftx": unless(0, 0.0, then=refused("no other loss is added to a preference loss")),
    "pref_bco_weight": unless(0, 0.0, then=refused("no other loss is added to a preference loss")),
    "dpo_label_smoothing": carried("loss.label_smoothing", real),
    "simpo_gamma": carried("loss.gamma", real),
    "kto_chosen_weight": carried("loss.desirable_weight", real),
    "kto_rejected_weight": carried("loss.undesirable_weight", real),
    "ppo_*": refused("belongs to another kind of training"),
    "ref_model*": refused("belongs to another kind of training"),
    "reward_model*": refused("belongs to another kind of training"),
    "pure_bf16": flag(changed("fp32 master weights and moments are kept", "shard.precision", const("bf16"))),
    "early_stopping_steps": changed("a stage trains for its whole length"),
    "disable_shuffling": flag(refused("rows are read in an order drawn from the seed")),
    "plot_loss": LOGGING,
    "compute_accuracy": LOGGING,
    "*swanlab*": LOGGING,
}
_MODEL: Table = {
    **MODEL_ARGUMENTS,
    "cache_dir": no_effect("the hub's own cache counts"),
    "use_fast_tokenizer": no_effect("tokenizers are the fast ones"),
    "resize_vocab": flag(no_effect("embeddings grow where tokens are added")),
    "split_special_tokens": flag(refused("special tokens in a text are read as text")),
    "add_*tokens": carried("new_tokens", texts),
    "new_special_tokens_config": refused("tokens cannot be added to a model"),
    "init_special_tokens": _UNUSED,
    "rope_scaling": refused("a model's own configuration counts"),
    "flash_attn": FASTER,
    "shift_attn": flag(refused("attention is the model's own")),
    "use_unsloth*": flag(FASTER),
    "enable_liger_kernel": FASTER,
    "use_v1_kernels": FASTER,
    "use_kv_cache": FASTER,
    "use_reentrant_gc": FASTER,
    "moe_aux_loss_coef": changed("a model's own configuration decides about its router loss"),
    "disable_gradient_checkpointing": flag(no_effect("is off"), carried(CHECKPOINTING, const(True))),
    "upcast_*": flag(changed("norms and head are held as `shard.precision` says")),
    "train_from_scratch": flag(carried("reset_weights", truth)),
    "quantization_bit": Choice({4: IN_4_BITS.cases[True], 8: IN_8_BITS.cases[True]}, changed(QUANTISED)),
    "quantization_*": ONE_FORM,
    "double_quantization": ONE_FORM,
    "fp8": flag(changed("products are bf16")),
    "fp8_*": no_effect("products are bf16"),
    "hf_hub_token": no_effect("the hub's own login counts"),
    "ms_hub_token": no_effect("models come from the Hugging Face hub"),
    "om_hub_token": no_effect("models come from the Hugging Face hub"),
    "print_param_status": LOGGING,
    "image_*": _PIXELS,
    "crop_to_patches": _PIXELS,
    "video_*": no_effect("videos are not read"),
    "audio_*": no_effect("audio is not read"),
    "use_audio_in_video": no_effect("videos are not read"),
    "device_map": DIVIDES,
    "export_*": _EXPORTS,
    "export_hf_on_finish": no_effect("models are always kept in transformers' layout"),
    "infer_backend": _SERVES,
    "infer_dtype": _SERVES,
    "vllm_*": no_effect("answers are drawn by `trainwright sample`"),
    "sglang_*": no_effect("answers are drawn by `trainwright sample`"),
    "predict_with_generate": no_effect("an `evaluate` stage writes and measures answers"),
    "use_kt": DIVIDES,
    "kt_*": DIVIDES,
}
_DATA: Table = {
    "dataset": Section(read_training),
    "eval_dataset": Section(read_evaluation),
    "dataset_dir": carried(DATASET_DIR, text),
    "media_dir": changed("images start at the folder of the file that names them"),
    "template": changed(OWN_TEMPLATE, "template", const("chat")),
    "default_system": refused("rows have their own system message, or none"),
    "tool_format": changed(OWN_TEMPLATE),
    "enable_thinking": changed(OWN_TEMPLATE),
    "preserve_thinking": changed(OWN_TEMPLATE),
    "cutoff_len": carried("train.sequence_length", positive),
    "train_on_prompt": flag(carried("loss_on", const("all"))),
    "mask_history": flag(refused("every answer of a conversation is learnt, or all tokens")),
    "max_samples": carried(LIMIT, positive),
    "val_size": carried(q.HELD_OUT_SHARE, share),
    "packing": flag(
        changed("attention never crosses a row's border", "train.packing", truth), carried("train.packing", truth)
    ),
    "neat_packing": flag(carried("train.packing", truth)),
    "mix_strategy": Choice(
        {
            "concat": no_effect("each row comes once an epoch"),
            "interleave_under": carried(UNTIL, const("first")),
            "interleave_over": carried(UNTIL, const("all")),
            "interleave_once": changed("rows of all data sets are drawn, each once an epoch"),
        },
        refused("must be concat, interleave_under, interleave_over or interleave_once"),
    ),
    "interleave_probs": carried(SHARES, shares),
    "tokenized_path": no_effect("rows are laid out once, in the store"),
    "ignore_pad_token_for_loss": no_effect("padding is in neither loss nor attention"),
    "eval_on_each_dataset": LOGGING,
    "eval_num_beams": LOGGING,
    "streaming": LOADING,
    "buffer_size": LOADING,
    "overwrite_cache": LOADING,
    "preprocessing_*": LOADING,
    "data_shared_file_system": LOADING,
}
_PLACEMENT: Table = {
    "deepspeed": NAMED_FILE,
    "fsdp": changed("sharded by DeepSpeed's ZeRO 3, which shards the same", "shard.zero", const(3)),
    "fsdp_config": DIVIDES,
    "ray_num_workers": carried(q.WORKERS, positive),
    "ray_*": DIVIDES,
    "placement_strategy": DIVIDES,
    "resources_per_worker": DIVIDES,
    "master_addr": DIVIDES,
    "use_mca": DIVIDES,
    "use_megatron_bridge": DIVIDES,
    "mixed_precision": Choice({"bf16_mixed": carried("shard.precision", const("bf16"))}, refused("must be bf16_mixed")),
    **dict.fromkeys((
        "*_parallel_size", "sequence_parallel", "use_distributed_optimizer", "bias_activation_fusion",
        "apply_rope_fusion",
        "overlap_*", "moe_grouped_gemm", "moe_token_dispatcher_type", "recompute_granularity",
    ), DIVIDES),
    "use_packed_sequences": flag(carried("train.packing", truth)),
}  # fmt: skip


def _finish(draft: Draft) -> None:
    """What its defaults make of each other."""
    if draft.get(q.ADAPTER) and "lora.alpha" not in draft.values:
        draft.values["lora.alpha"] = 2 * draft.get("lora.r", 8)
        draft.comments["lora"] = "alpha: twice the rank, LLaMA-Factory's default"
    if draft.get("loss.name") == "kto":
        draft.values[q.KIND] = "preference"
    if draft.get(q.KIND) == "pretrain":
        draft.values[DOCUMENTS] = True
        if draft.get(q.ADAPTER):
            draft.values[q.KIND] = "finetune"
            draft.values["loss_on"] = "all"
        draft.values.setdefault("train.packing", True)
    draft.values.setdefault("train.packing", False)


def _trains(value: Mapping[str, Any]) -> bool:
    return bool(value.get("do_train"))


def _kind_of(value: Mapping[str, Any]) -> str | None:
    return {"rm": "reward", "dpo": "preference", "kto": "preference", "ppo": "rl"}.get(str(value.get("stage")))


SYSTEM = System(
    "llama-factory",
    "LLaMA-Factory",
    frozenset({"stage", "finetuning_type", "dataset_dir", "template", "lora_target", "export_dir",
               "infer_backend"}),
    {**TRAINING_ARGUMENTS, **_MODEL, **_METHOD, **_DATA, **_PLACEMENT},
    {**TRAINING_DEFAULTS, "stage": "sft", "finetuning_type": "lora", "cutoff_len": 2048,
     "disable_gradient_checkpointing": False},
    trains=_trains,
    kind_of=_kind_of,
    finish=_finish,
)  # fmt: skip
