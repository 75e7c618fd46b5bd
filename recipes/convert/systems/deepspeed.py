"""DeepSpeed's JSON: how a stage is sharded; DeepSpeed's own file is generated from a recipe's `shard`."""

import json
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.draft import Draft
from recipes.convert.engine import enter
from recipes.convert.readers import const, number, pair, positive, real, whole
from recipes.convert.rules import (
    Choice,
    Entry,
    Place,
    Section,
    Table,
    carried,
    changed,
    flag,
    no_effect,
    refused,
    unless,
)
from recipes.convert.system import System
from recipes.problem_codes import Code

BUCKETS = no_effect("bucket sizes are derived from the model")
GENERATED = no_effect("written by Trainwright into the configuration that it gives DeepSpeed")
ZERO = Choice(
    {stage: carried("shard.zero", const(stage)) for stage in range(4)},
    refused("must be 0, 1, 2 or 3", Code.OUT_OF_RANGE),
)
OFFLOAD: dict[str, Entry] = {
    "device": Choice(
        {
            "cpu": carried("shard.offload", const("cpu")),
            "none": no_effect("is off"),
            "nvme": changed("optimiser state goes to host memory; NVMe is not used", "shard.offload", const("cpu")),
        },
        refused("must be none, cpu or nvme"),
    ),
    "*": GENERATED,
}


def or_auto(entry: Entry) -> Entry:
    """`auto`: the trainer around DeepSpeed fills it in."""
    return Choice({"auto": no_effect("is filled in by the trainer around DeepSpeed")}, entry)


TABLE: Table = {
    "zero_optimization": {
        "stage": ZERO,
        "offload_optimizer": OFFLOAD,
        "cpu_offload": flag(carried("shard.offload", const("cpu"))),
        "offload_param": {
            "device": Choice(
                {"none": no_effect("is off")},
                changed(
                    "parameters stay on the GPUs; optimiser state goes to host memory", "shard.offload", const("cpu")
                ),
            ),
            "*": GENERATED,
        },
        "zero_quantized_*": flag(refused("gradients and weights are not sent in fewer bits")),
        "zero_hpz_partition_size": unless(1, then=no_effect("how the work is divided among GPUs")),
        "*": BUCKETS,
    },
    "bf16": {"enabled": or_auto(flag(carried("shard.precision", const("bf16")))), "*": GENERATED},
    "fp16": {
        "enabled": or_auto(flag(changed("fp16 is not there; auto is bf16 where the GPU has it, else fp32"))),
        "*": no_effect("there is no loss scaling without fp16"),
    },
    "train_batch_size": or_auto(carried("train.global_batch", positive)),
    "train_micro_batch_size_per_gpu": or_auto(carried(q.MICRO_BATCH, positive)),
    "gradient_accumulation_steps": or_auto(carried(q.ACCUMULATION, positive)),
    "gradient_clipping": or_auto(unless(0, 0.0, then=carried("train.gradient_clipping", real))),
    "optimizer": {
        "type": Choice(
            {
                "AdamW": carried("train.optimizer.name", const("adamw")),
                "Adam": changed("decoupled weight decay", "train.optimizer.name", const("adamw")),
            },
            refused("another optimiser than AdamW"),
        ),
        "params": {
            "lr": or_auto(carried("train.optimizer.lr", real)),
            "betas": or_auto(carried("train.optimizer.betas", pair)),
            "eps": or_auto(carried("train.optimizer.eps", real)),
            "weight_decay": or_auto(carried("train.optimizer.weight_decay", real)),
            "*": GENERATED,
        },
    },
    "scheduler": {
        "type": Choice(
            {
                "WarmupLR": carried("train.schedule.name", const("constant")),
                "WarmupDecayLR": carried("train.schedule.name", const("linear")),
                "WarmupCosineLR": carried("train.schedule.name", const("cosine")),
            },
            refused("must be WarmupLR, WarmupDecayLR or WarmupCosineLR"),
        ),
        "params": {
            "warmup_num_steps": or_auto(carried(q.WARMUP_STEPS, number)),
            "total_num_steps": or_auto(carried(q.STEPS, whole)),
            "*": no_effect("the peak is the optimiser's learning rate; the warm-up starts at 0"),
        },
    },
    "activation_checkpointing": no_effect("`shard.gradient_checkpointing` says whether activations are recomputed"),
    "tensor_parallel": no_effect("how the work is divided among GPUs"),
    "fp8": changed("weights and activations are bf16"),
    "torch_autocast": GENERATED,
    "compression_training": refused("models are not compressed while they train"),
    "zero_allow_untested_optimizer": GENERATED,
    "zero_force_ds_cpu_optimizer": GENERATED,
    "communication_data_type": GENERATED,
    "*log*": no_effect("every run writes its own metrics, samples and report"),
    "tensorboard": no_effect("every run writes its own metrics, samples and report"),
    "wandb": no_effect("every run writes its own metrics, samples and report"),
    "monitor_config": no_effect("every run writes its own metrics, samples and report"),
    "comms_config": no_effect("every run writes its own metrics, samples and report"),
    "wall_clock_breakdown": no_effect("the report shows where the time went"),
    "steps_per_print": no_effect("every run writes its own metrics, samples and report"),
    "dump_state": no_effect("every run writes its own metrics, samples and report"),
    "prescale_gradients": GENERATED,
    "checkpoint": no_effect("saved states are Trainwright's own"),
}

SYSTEM = System(
    "deepspeed",
    "DeepSpeed",
    frozenset(
        {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "zero_allow_untested_optimizer"}
    ),
    TABLE,
    is_whole=False,
)


def _read_file(value: Any, draft: Draft, place: Place) -> None:
    """A DeepSpeed configuration that another file names, or holds."""
    if isinstance(value, dict):
        enter(TABLE, value, draft, place)
        return
    found = next((path for path in draft.places(str(value)) if path.is_file()), None)
    if found is None:
        stage = next((number for number in "3210" if f"zero{number}" in str(value) or f"z{number}" in str(value)), None)
        if stage is None:
            draft.reject(place, value, f"no such file under {draft.working_dir}")
            return
        rule = changed(f"no such file here; its name says ZeRO {stage}", "shard.zero", const(int(stage)))
        draft.note(place, value, rule)
        return
    try:
        held = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        draft.reject(place, value, f"{found} is not valid JSON: {error}")
        return
    if not isinstance(held, dict):
        draft.reject(place, value, f"{found} holds no JSON object")
        return
    enter(TABLE, held, draft, place)


NAMED_FILE = Section(_read_file)
