"""Memory by part, operations, time, price and changes that make a stage fit, against figures by hand."""

from typing import Any

import pytest

from recipes.errors import RequestError
from recipes.loading.load import parse_recipe
from recipes.models.known_models import known_model
from recipes.planning.cost import stated_rates
from recipes.planning.fingerprint import ParentId, fingerprint
from recipes.planning.gpus import GPUS, nearest_gpu, parse_gpus
from recipes.planning.memory import Memory
from recipes.planning.plan import Plan, build_plan
from recipes.planning.prediction import External
from recipes.recipe import Recipe

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32000,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
P_7B, N_7B = 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008)
"""Parameters (Touvron et al. 2023), and those of the linear modules of its blocks."""
BUCKET, EMBEDDING = 50_000_000, 32000 * 4096


def tune(shard: dict[str, Any], length: int, batch: int, **stage: Any) -> dict[str, Any]:
    """A fine-tuning of ten steps of a model from outside."""
    train = {"steps": 10, "global_batch": batch, "sequence_length": length, "optimizer": {"lr": 1e-5}}
    data = {"source": "python-docs"}
    return {"kind": "finetune", "init_from": "./model", "data": data, "train": train, "shard": shard, **stage}


def recipe_of(**stages: Any) -> Recipe:
    return parse_recipe({"name": "r", "cluster": {"gpus_per_worker": 1, "price_per_gpu_hour": 2.0}, "stages": stages})


def plan_of(recipe: Recipe, config: dict[str, Any], workers: int, gpu: str = "H100") -> Plan:
    outside = External(ParentId("f", "d"), model=known_model(config))
    return build_plan(
        recipe,
        workers=workers,
        data={name: {use.field_path: "d" for use in stage.sources()} for name, stage in recipe.stages.items()},
        externals={
            name: {item.field_path: outside for item in stage.inputs() if item.text == "./model"}
            for name, stage in recipe.stages.items()
        },
        rates=stated_rates(GPUS[gpu], 0.4),
    )


def test_memory_of_llama_7b_in_full_on_eight_gpus() -> None:
    shard = {"engine": "deepspeed", "zero": 3, "precision": "bf16", "micro_batch": 1}
    (tuned,) = plan_of(recipe_of(tuned=tune(shard, 2048, 8)), LLAMA_7B, 8).stages
    assert tuned.sizes is not None
    token = 18 * 4096 + 5 * 11008  # of a layer, without the scores that torch's kernels do not keep
    activations = 2048 * 33 * token * 2 + 2 * 2048**2 * 2
    parts = Memory(
        weights=P_7B * 2 // 8,
        gradients=P_7B * 4 // 8,
        optimizer=P_7B * 12 // 8,
        buffers=BUCKET * 4 + (BUCKET + EMBEDDING) * 2 + 3 * EMBEDDING * 4,
        activations=activations,
        logits=3 * 2**21 * 4,
    )
    assert parts.total > P_7B * 20 // 8 + P_7B * 2, "the whole model fits next to the state in place of activations"
    assert tuned.sizes.memory == parts
    assert tuned.sizes.host_bytes == P_7B * 4
    assert tuned.sizes.artifact_bytes == P_7B * 2
    assert tuned.sizes.state_bytes == P_7B * 12


def test_operations_time_and_price_of_llama_7b() -> None:
    shard = {"engine": "deepspeed", "zero": 3, "precision": "bf16", "micro_batch": 1}
    (tuned,) = plan_of(recipe_of(tuned=tune(shard, 2048, 8)), LLAMA_7B, 8).stages
    token = 6 * (N_7B + EMBEDDING) + 12 * 32 * 2048 * 4096
    assert tuned.step_flops == 8 * 2048 * token
    assert tuned.cost is not None
    assert tuned.cost.flops.training == 10 * 8 * 2048 * token
    assert tuned.cost.seconds is not None
    by_hand = tuned.cost.flops.total / (8 * 0.4 * 989e12)
    updates = 10 * P_7B * 28 / 8 / (0.6 * 3.35e12)
    assert tuned.cost.seconds == pytest.approx(by_hand + updates)
    assert tuned.cost.price == pytest.approx(tuned.cost.seconds / 3600 * 8 * 2.0)


def test_adapters_save_weight_gradients_and_optimiser() -> None:
    shard = {"engine": "deepspeed", "zero": 2, "precision": "bf16", "micro_batch": 1}
    lora = {"r": 16, "alpha": 32, "target_modules": ["q_proj"]}
    (tuned,) = plan_of(recipe_of(tuned=tune(shard, 2048, 8, lora=lora)), LLAMA_70B, 8, "B200").stages
    adapter, n = 80 * 16 * 2 * 8192, 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert tuned.sizes is not None
    assert tuned.sizes.trainable_parameters == adapter
    assert tuned.sizes.memory.optimizer == adapter * 12 // 8
    assert tuned.sizes.memory.weights == (68_976_648_192 + adapter) * 2
    token = 4 * n + 12 * 80 * 2048 * 8192 + 6 * adapter
    assert tuned.step_flops == 8 * 2048 * (token + 4 * 32000 * 8192)
    bits = {**lora, "quantize": "nf4"}
    for zero in (2, 3):  # the codes are whole on every worker; the rest is shared by ZeRO 3
        recipe = recipe_of(tuned=tune({**shard, "zero": zero}, 2048, 8, lora=bits))
        (small,) = plan_of(recipe, LLAMA_70B, 8, "B200").stages
        assert small.sizes is not None
        rest = (68_976_648_192 - n + adapter) * 2 / (8 if zero == 3 else 1)
        assert small.sizes.memory.weights == pytest.approx(rest + n * (0.5 + 4 / 64), abs=8)


def test_recomputed_activations_take_another_forward() -> None:
    shard = {"engine": "plain", "precision": "bf16", "micro_batch": 1}
    plain, again = (
        plan_of(recipe_of(tuned=tune({**shard, "gradient_checkpointing": on}, 2048, 8)), LLAMA_7B, 8).stages[0]
        for on in (False, True)
    )
    assert plain.step_flops is not None
    assert again.step_flops == plain.step_flops + 8 * 2048 * (2 * N_7B + 4 * 32 * 2048 * 4096)
    assert plain.sizes is not None
    assert again.sizes is not None
    assert again.sizes.memory.activations < plain.sizes.memory.activations / 5


def test_a_reference_reads_every_pair_once() -> None:
    train = {"epochs": 2, "global_batch": 8, "sequence_length": 512, "optimizer": {"lr": 1e-5}}
    stage = {"kind": "preference", "init_from": "./model", "data": {"source": "python-docs"}}
    stage |= {"train": train, "shard": {"engine": "plain", "precision": "bf16"}}
    with_start, without = (
        recipe_of(tuned={**stage, "loss": {"name": name}}).stages["tuned"].passes(10) for name in ("dpo", "orpo")
    )
    assert [(found.samples, found.times, found.trains) for found in with_start[len(without) :]] == [(16, 5.0, False)]


def test_a_price_is_no_meaning() -> None:
    shard = {"engine": "plain", "precision": "bf16"}
    recipe = recipe_of(tuned=tune(shard, 64, 8))
    free = recipe.changed(cluster=recipe.cluster.changed(price_per_gpu_hour=None))
    parents = {"init_from": ParentId("f", "d")}
    assert fingerprint("tuned", recipe, parents, {}) == fingerprint("tuned", free, parents, {})


def test_gpus_by_name() -> None:
    assert str(parse_gpus("8xh100")) == "8xH100"
    assert str(parse_gpus("rtx 4090")) == "1xRTX-4090"
    assert parse_gpus("16 x A100").gpu.gib == 80
    with pytest.raises(RequestError, match=r"--on 8xH101: .* H100\?"):
        parse_gpus("8xH101")
    with pytest.raises(RequestError, match=r"--on Trainium: .* B200, H200"):
        parse_gpus("Trainium")
    with pytest.raises(RequestError, match=r"--on 0xH100: .* 8xH100"):
        parse_gpus("0xH100")
    assert nearest_gpu(85_520_809_984, 90).name == "H100"
    assert nearest_gpu(42_297_786_368, 80).name == "A100-40"
