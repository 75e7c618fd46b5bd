"""Keys of transformers' TrainingArguments, which TRL's and LLaMA-Factory's files share."""

from typing import Any

from recipes.convert import quantities as q
from recipes.convert.readers import const, number, one_of, positive, real, share, text, truth, whole
from recipes.convert.rules import (
    OFF,
    Choice,
    Entry,
    Table,
    Unfit,
    carried,
    changed,
    flag,
    no_effect,
    refused,
    unless,
)
from recipes.problem_codes import Code

LOGGING = no_effect("every run writes its own metrics, samples and report")
STORED = no_effect("the store keeps what a run makes; `trainwright store export` writes it out")
RESUMES = no_effect("a run resumes from its own saved state: `trainwright resume`")
FASTER = no_effect("changes speed or memory, not what is computed")
DIVIDES = no_effect("how the work is divided among GPUs; `cluster` and `shard` say it here")
LOADING = no_effect("how rows are read and prepared; they are laid out once, in the store")
NO_REMOTE_CODE = flag(changed("code from a model's folder is never run: the type must be one of transformers' own"))
SMALLER_STATE = "the same AdamW with its moments in 32 bits: 8 bytes per trained parameter"
QUANTISED = "weights that are quantised another way are not read; `lora.quantize` keeps the base in 4 bits (nf4) or 8"
IN_4_BITS = flag(carried("lora.quantize", const("nf4")))
IN_8_BITS = flag(carried("lora.quantize", const("int8")))
ONE_FORM = no_effect(
    "`lora.quantize` has one form: nf4 with a scale for each 64 values, or 8 bits with one for each row"
)
OWN_TEMPLATE = (
    "the chat template of the model's own folder counts; `check` shows a row in it, and says where it has none"
)
OWN_TOKENS = "the special tokens of the model's own folder count; edit them there if they differ"
CHECKPOINTING = "shard.gradient_checkpointing"

_LR = "train.optimizer.lr"
_EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "paged_adamw_8bit")
_PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw")
_PAGED = ("paged_adamw", "paged_adamw_32bit")

OPTIMIZER = Choice(
    {
        **dict.fromkeys(_PLAIN_ADAMW, carried("train.optimizer.name", const("adamw"))),
        **dict.fromkeys(_EIGHT_BIT, changed(SMALLER_STATE, "train.optimizer.name", const("adamw"))),
        **dict.fromkeys(
            _PAGED,
            changed("the same AdamW; its moments are not paged", "train.optimizer.name", const("adamw")),
        ),
    },
    refused("another optimiser than AdamW"),
)
SCHEDULER = Choice(
    {
        "cosine_with_min_lr": carried("train.schedule.name", const("cosine")),
        "constant_with_warmup": carried("train.schedule.name", const("constant")),
    },
    carried("train.schedule.name", one_of({name: name for name in ("linear", "cosine", "constant")})),
)


def _clipping(value: Any) -> float:
    found = number(value)
    if found <= 0:
        raise Unfit("gradients are always clipped here; give a large norm, for example 1e6", Code.OUT_OF_RANGE)
    return float(found)


def cadence(target: str) -> Entry:
    """Steps between two events; a share of the training, or -1, leaves the default."""
    own = no_effect("counted in steps here; the default is 100")

    def steps(value: Any) -> int:
        return positive(value)

    return Choice({-1: own, 0: own, "no": own, "epoch": own}, carried(target, steps))


def cadence_by_epoch() -> Entry:
    """Events counted per epoch."""
    return no_effect("`save_every` and `evaluate_every` are counted in steps; the default is 100")


PRECISION: Table = {
    "bf16": Choice(
        {"auto": carried("shard.precision", const("auto")), "full": carried("shard.precision", const("bf16"))},
        flag(carried("shard.precision", const("bf16")), carried("shard.precision", const("fp32"))),
    ),
    "fp16": flag(changed("fp16 with loss scaling is not there: bf16 or fp32, as `shard.precision` says")),
    "tf32": no_effect("matrix products in TF32 are torch's setting"),
}

TRAINING_ARGUMENTS: Table = {
    **PRECISION,
    "learning_rate": carried(_LR, real),
    "weight_decay": carried("train.optimizer.weight_decay", real),
    "adam_beta1": carried(q.BETA1, real),
    "adam_beta2": carried(q.BETA2, real),
    "adam_epsilon": carried("train.optimizer.eps", real),
    "max_grad_norm": carried("train.gradient_clipping", _clipping),
    "optim": OPTIMIZER,
    "lr_scheduler_type": SCHEDULER,
    "lr_scheduler_kwargs": {
        "min_lr_rate": carried("train.schedule.min_ratio", real),
        "*": refused("the schedule has warm-up, shape and a final ratio alone"),
    },
    "warmup_ratio": carried(q.WARMUP_SHARE, share),
    "warmup_steps": carried(q.WARMUP_STEPS, number),
    "num_train_epochs": carried(q.EPOCHS, real),
    "max_steps": unless(-1, then=carried(q.STEPS, whole)),
    "per_device_train_batch_size": carried(q.MICRO_BATCH, positive),
    "gradient_accumulation_steps": carried(q.ACCUMULATION, positive),
    "auto_find_batch_size": flag(FASTER),
    "save_steps": cadence("train.save_every"),
    "eval_steps": cadence("train.evaluate_every"),
    "save_strategy": cadence_by_epoch(),
    "eval_strategy": cadence_by_epoch(),
    "evaluation_strategy": cadence_by_epoch(),
    "seed": carried(q.SEED, whole),
    "data_seed": no_effect("one seed decides everything; `seed` sets it"),
    "gradient_checkpointing": flag(carried(CHECKPOINTING, truth)),
    "gradient_checkpointing_kwargs": FASTER,
    "label_smoothing_factor": unless(0, then=refused("the loss is not smoothed")),
    "neftune_noise_alpha": unless(0, then=refused("embeddings get no noise")),
    "group_by_length": flag(changed("rows are read in one order, drawn from the seed")),
    "load_best_model_at_end": flag(changed("the last step's model is kept, not the best of the evaluations")),
    "resume_from_checkpoint": RESUMES,
    "per_device_eval_batch_size": FASTER,
    "eval_accumulation_steps": FASTER,
    "bf16_full_eval": FASTER,
    "fp16_full_eval": FASTER,
    "torch_compile": FASTER,
    "torch_compile_*": FASTER,
    "torch_empty_cache_steps": FASTER,
    "use_liger_kernel": FASTER,
    "liger_kernel_config": FASTER,
    "dataloader_*": LOADING,
    "remove_unused_columns": LOADING,
    "ddp_*": DIVIDES,
    "fsdp_transformer_layer_cls_to_wrap": DIVIDES,
    "local_rank": DIVIDES,
    "accelerator_config": DIVIDES,
    "output_dir": STORED,
    "overwrite_output_dir": STORED,
    "save_total_limit": no_effect("the store keeps what its retention says"),
    "save_only_model": no_effect("resumable state is always saved"),
    "save_safetensors": no_effect("weights are always safetensors"),
    "save_on_each_node": STORED,
    "push_to_hub*": STORED,
    "hub_*": STORED,
    "logging_*": LOGGING,
    "log_level*": LOGGING,
    "report_to": LOGGING,
    "run_name": LOGGING,
    "disable_tqdm": LOGGING,
    "include_*": LOGGING,
    "metric_for_best_model": LOGGING,
    "greater_is_better": LOGGING,
    "do_train": no_effect("a recipe is trained by `trainwright run`"),
    "do_eval": no_effect("the end is always evaluated where rows are held out"),
    "do_predict": no_effect("an `evaluate` stage measures a model"),
    "eval_on_start": LOGGING,
    "trust_remote_code": NO_REMOTE_CODE,
    "env": no_effect("variables of the environment are set where the workers start"),
}
"""With transformers' meaning; what a system reads in another way, its own table says."""

TRAINING_DEFAULTS = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
}
"""Of transformers, where they are not Trainwright's."""

MODEL_ARGUMENTS: Table = {
    "model_name_or_path": carried(q.MODEL, text),
    "model_revision": carried(q.REVISION, text),
    "attn_implementation": FASTER,
    "dtype": no_effect("weights are held as `shard.precision` says"),
    "torch_dtype": no_effect("weights are held as `shard.precision` says"),
    "low_cpu_mem_usage": FASTER,
    "load_in_8bit": IN_8_BITS,
    "load_in_4bit": IN_4_BITS,
    "bnb_4bit_quant_type": Choice({"nf4": OFF}, changed("4 bits are nf4")),
    "bnb_4bit_*": ONE_FORM,
    "use_bnb_nested_quant": ONE_FORM,
}
