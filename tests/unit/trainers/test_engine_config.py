"""DeepSpeed's configuration is made from the recipe alone."""

import pytest

from trainers.engine.config import MAX_BUCKET, deepspeed_config


def config(**changes: object) -> dict:
    given = {
        "zero": 2,
        "precision": "fp32",
        "offload": "none",
        "clip": 1.0,
        "trainable_elements": 10**6,
        "on_cpu": True,
    }
    return deepspeed_config(**{**given, **changes})


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sharded_stages_clip_and_check_for_overflow(zero: int) -> None:
    found = config(zero=zero, precision="bf16", clip=0.5)
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["communication_data_type"] == "fp32"


def test_zero_0_leaves_clipping_and_masters_to_its_own_optimiser() -> None:
    found = config(zero=0, precision="bf16")
    assert found["gradient_clipping"] == 0.0
    assert "bf16" not in found


def test_no_op_is_compiled_and_the_caller_owns_the_boundary() -> None:
    found = config()
    assert "optimizer" not in found
    assert found["managed_gradient_accumulation"] is False


@pytest.mark.parametrize(("elements", "bucket"), [(10, 1_000), (123_456, 123_456), (10**10, MAX_BUCKET)])
def test_buckets_fit_the_model(elements: int, bucket: int) -> None:
    assert config(trainable_elements=elements)["zero_optimization"]["reduce_bucket_size"] == bucket
