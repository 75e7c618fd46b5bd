"""accelerate's configuration: how a training is spread over GPUs."""

from recipes.convert import quantities as q
from recipes.convert.readers import const, positive, real, truth
from recipes.convert.rules import Choice, Table, carried, changed, flag, no_effect, refused, unless
from recipes.convert.system import System
from recipes.convert.systems.deepspeed import NAMED_FILE, OFFLOAD, ZERO, or_auto
from recipes.convert.systems.transformers_arguments import CHECKPOINTING, DIVIDES, FASTER, LOGGING

SHARDS = "sharded by DeepSpeed's ZeRO, which shards the same"
_FULL, _GRADIENTS = changed(SHARDS, "shard.zero", const(3)), changed(SHARDS, "shard.zero", const(2))

FSDP: Table = {
    "fsdp_sharding_strategy": Choice(
        {
            **dict.fromkeys(("FULL_SHARD", "HYBRID_SHARD", 1, 4), _FULL),
            **dict.fromkeys(("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2", 2, 5), _GRADIENTS),
            **dict.fromkeys(("NO_SHARD", 3), carried("shard.zero", const(0))),
        },
        refused("must be FULL_SHARD, SHARD_GRAD_OP or NO_SHARD"),
    ),
    "fsdp_reshard_after_forward": Choice({"FULL_SHARD": _FULL, "SHARD_GRAD_OP": _GRADIENTS}, flag(_FULL, _GRADIENTS)),
    "fsdp_offload_params": flag(changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))),
    "fsdp_activation_checkpointing": flag(carried(CHECKPOINTING, truth)),
    "fsdp_*": DIVIDES,
}
_DEEPSPEED: Table = {
    "zero_stage": ZERO,
    "offload_optimizer_device": OFFLOAD["device"],
    "offload_param_device": unless(
        "none", then=changed("optimiser state alone goes to host memory", "shard.offload", const("cpu"))
    ),
    "gradient_accumulation_steps": or_auto(carried(q.ACCUMULATION, positive)),
    "gradient_clipping": or_auto(carried("train.gradient_clipping", real)),
    "deepspeed_config_file": NAMED_FILE,
    "*": DIVIDES,
}
TABLE: Table = {
    "distributed_type": no_effect("one torch loop or DeepSpeed, as `shard` says"),
    "mixed_precision": Choice(
        {
            "bf16": carried("shard.precision", const("bf16")),
            "no": carried("shard.precision", const("fp32")),
            False: carried("shard.precision", const("fp32")),
            "fp16": changed("fp16 with loss scaling is not there; auto is bf16 where the GPU has it, else fp32"),
            "fp8": changed("products are bf16", "shard.precision", const("bf16")),
        },
        refused("must be no, fp16, bf16 or fp8"),
    ),
    "num_processes": carried(q.WORKERS, positive),
    "deepspeed_config": _DEEPSPEED,
    "fsdp_config": FSDP,
    "parallelism_config": DIVIDES,
    "use_cpu": flag(changed("a cluster with GPUs trains on them; `cluster: {gpus_per_worker: 0}` does not")),
    "dynamo_*": FASTER,
    "debug": LOGGING,
    **dict.fromkeys(
        ("compute_environment", "downcast_bf16", "enable_cpu_affinity", "gpu_ids", "machine_rank", "main_*",
         "num_machines", "rdzv_*", "same_network", "tpu_*", "commands", "ipex_config",
         "megatron_lm_config", "mpirun_config"),
        DIVIDES,
    ),
}  # fmt: skip
"""`num_processes` counts those of all machines."""

SYSTEM = System(
    "accelerate",
    "accelerate",
    frozenset({"distributed_type", "compute_environment", "num_processes", "main_training_function"}),
    TABLE,
    is_whole=False,
)
