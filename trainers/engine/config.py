"""DeepSpeed's configuration as a pure function of what the recipe says; nobody writes its JSON by hand."""

from typing import Any

from recipes.stages.sharding import MAX_BUCKET

PERSISTENCE_THRESHOLD = 100_000
"""Elements up to which ZeRO 3 keeps a parameter whole on every rank; gathering small ones costs more than it saves."""
NEVER = 2**31 - 1


def deepspeed_config(
    *, zero: int, precision: str, offload: str, clip: float, trainable_elements: int, on_cpu: bool
) -> dict[str, Any]:
    """Return the configuration of one engine.

    The caller owns the accumulation boundary; micro-batch sizes in here have no effect. ZeRO 0 keeps its optimiser on
    every rank and is clipped and skipped by it, so DeepSpeed's own mixed precision and clipping stay off there.
    """
    bucket = max(1_000, min(MAX_BUCKET, trainable_elements))
    zero_optimization: dict[str, Any] = {
        "stage": zero,
        "overlap_comm": not on_cpu and zero >= 2,
        "contiguous_gradients": zero >= 2,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * max(bucket, 1_000),
    }
    if zero == 3:
        zero_optimization |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            # Above 0, DeepSpeed looks through all later modules of the step for each module once: quadratic in
            # modules, and over half of a short stage's time with adapters on 30 layers. At 0 a parameter is gathered
            # once more instead.
            "stage3_max_reuse_distance": 0,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if offload == "cpu" and zero >= 1 and not on_cpu:
        zero_optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "communication_data_type": "fp32",
        "gradient_clipping": clip if zero >= 1 else 0.0,
    }
    if zero >= 1 and precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
