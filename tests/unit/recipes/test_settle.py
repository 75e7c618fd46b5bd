"""What `auto` in a stage's shard is settled to, and that a resume keeps it."""

from pathlib import Path
from typing import Any

import pytest

from recipes.loading.load import load_recipe
from recipes.planning.memory import Memory, Sizes
from recipes.planning.settle import MEMORY_SHARE, PROCESS_BYTES, Hardware, keep_settled, settle_shards
from recipes.recipe import Recipe
from recipes.stages.sharding import Shard

RECIPES = Path(__file__).parents[3] / "recipes"
AMX = Hardware(fast_bf16="amx_bf16", worker_bytes=64 << 30)
SLOW = Hardware(lacking="10.0.0.1: its CPU has no amx_bf16", worker_bytes=64 << 30)
GPU = Hardware(is_gpu=True, fast_bf16="compute capability 9.0", worker_bytes=80 << 30)
STATE = {("plain", 0): 10 << 30, ("deepspeed", 0): 10 << 30, ("deepspeed", 1): 7 << 30, ("deepspeed", 2): 5 << 30}
"""Bytes that a stage takes under each engine in these tests; ZeRO 3: three GiB."""


def predict(recipe: Recipe) -> dict[str, Sizes | None]:
    """Sizes of stages that take what STATE says."""
    return {
        name: Sizes(1, 1, Memory(STATE.get((stage.shard.engine, stage.shard.zero_stage), 3 << 30)), 1, 1, 0)
        for name, stage in recipe.stages.items()
    }


def shards(recipe: str, hardware: Hardware, workers: int, *overrides: str, known: bool = True) -> dict[str, Shard]:
    """Every stage's settled shard."""
    loaded = load_recipe(RECIPES / recipe, overrides).recipe
    settled = settle_shards(loaded, hardware, workers, predict if known else lambda _: {})
    return {name: stage.shard for name, stage in settled.recipe.stages.items()}


def test_text_is_bf16_where_the_hardware_is_fast_at_it() -> None:
    fast, slow = (shards("quickstart.yaml", hardware, 2) for hardware in (AMX, SLOW))
    assert {fast[name].precision for name in ("base", "sft", "reward", "second_reward", "eval")} == {"bf16"}
    assert fast["policy"].precision == "fp32"
    assert {shard.precision for shard in slow.values()} == {"fp32"}
    assert {shard.precision for shard in shards("image/ddpm.yaml", GPU, 1).values()} == {"fp32"}


def test_a_pinned_field_stays() -> None:
    pinned = ("stages.base.shard={precision: fp32, engine: deepspeed, zero: 3}", "stages.sft.shard.zero=1")
    found = shards("quickstart.yaml", AMX, 2, *pinned)
    base, chat = found["base"], found["sft"]
    assert (base.precision, base.engine, base.zero) == ("fp32", "deepspeed", 3)
    assert (chat.precision, chat.engine, chat.zero) == ("bf16", "deepspeed", 1)


def gib(amount: float, is_gpu: bool = False) -> Hardware:
    """Hardware with room for a prediction of so many GiB."""
    needed = int(amount * 2**30) + (0 if is_gpu else PROCESS_BYTES)
    return Hardware(is_gpu, worker_bytes=int(needed / MEMORY_SHARE) + 1)


@pytest.mark.parametrize(
    ("hardware", "workers", "wanted"),
    [
        (gib(1), 1, ("plain", 0)),
        (gib(10), 2, ("plain", 0)),
        (gib(9.9), 2, ("deepspeed", 1)),
        (gib(6), 2, ("deepspeed", 2)),
        (gib(4), 2, ("deepspeed", 3)),
        (gib(1), 2, ("deepspeed", 3)),
        (Hardware(), 2, ("deepspeed", 2)),
        (gib(80, is_gpu=True), 1, ("plain", 0)),
        (gib(80, is_gpu=True), 8, ("deepspeed", 2)),
        (gib(4.5, is_gpu=True), 8, ("deepspeed", 3)),
    ],
)
def test_the_engine_is_the_first_that_fits(hardware: Hardware, workers: int, wanted: tuple[str, int]) -> None:
    base = shards("quickstart.yaml", hardware, workers)["base"]
    assert (base.engine, base.zero) == wanted


def test_of_an_unknown_size_several_workers_shard_gradients() -> None:
    assert shards("quickstart.yaml", AMX, 2, known=False)["base"].engine_text == "zero 2"
    assert shards("quickstart.yaml", AMX, 1, known=False)["base"].engine_text == "plain"


def test_a_gan_never_shards_its_parameters() -> None:
    assert shards("image/gan.yaml", gib(1), 2)["gan"].engine_text == "zero 2"


def test_offload_needs_a_sharded_optimiser() -> None:
    for workers in (1, 4):
        offloaded = shards(
            "quickstart.yaml", GPU, workers, "stages.base.shard.offload=cpu", "cluster.gpus_per_worker=1"
        )
        assert offloaded["base"].engine_text == "zero 2"


def test_reasons_name_what_decided() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml", ["stages.sft.shard={precision: fp32, engine: plain}"]).recipe
    reasons = settle_shards(recipe, gib(6), 2, predict).reasons
    assert reasons["base"]["engine"] == "zero 2: 5.5 of 6.5 GiB; plain would take 10.5 in each worker"
    roomy = settle_shards(recipe, AMX, 2, predict).reasons["base"]
    assert roomy["engine"].startswith("plain: ")
    assert "sft" not in reasons
    assert settle_shards(recipe, SLOW, 2, predict).reasons["base"]["precision"] == f"fp32: {SLOW.lacking}"
    assert settle_shards(recipe, AMX, 2, predict).reasons["base"]["precision"].startswith("bf16: amx_bf16")


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ({}, ("bf16", "plain", 0)),
        ({"precision": "fp32"}, ("fp32", "plain", 0)),
        ({"zero": 3}, ("bf16", "deepspeed", 3)),
        ({"engine": "deepspeed"}, ("bf16", "deepspeed", 2)),
        ({"engine": "plain"}, ("bf16", "plain", 0)),
    ],
)
def test_a_resume_keeps_what_the_start_settled(wanted: dict[str, Any], kept: tuple[str, str, int]) -> None:
    before = settle_shards(load_recipe(RECIPES / "quickstart.yaml").recipe, AMX, 2, predict).recipe
    overrides = [f"stages.base.shard.{key}={value}" for key, value in wanted.items()]
    again = keep_settled(load_recipe(RECIPES / "quickstart.yaml", overrides).recipe, before)
    shard = again.stages["base"].shard
    assert (shard.precision, shard.engine, shard.zero) == kept
    assert all("auto" not in (s.shard.precision, s.shard.engine, s.shard.zero) for s in again.stages.values())


def sized_by_micro_batch(recipe: Recipe) -> dict[str, Sizes | None]:
    """A GiB for each sample of a micro-batch, of which `auto` takes 16."""
    return {
        name: Sizes(
            1, 1, Memory(activations=(16 if (micro := stage.shard.micro_batch) == "auto" else micro) << 30), 1, 1, 0
        )
        for name, stage in recipe.stages.items()
    }


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml", ["stages.sft.shard.micro_batch=16"]).recipe
    roomy = settle_shards(recipe, gib(16, is_gpu=True), 1, sized_by_micro_batch)
    assert roomy.recipe.stages["base"].shard.micro_batch == "auto"
    tight = settle_shards(recipe, gib(7, is_gpu=True), 1, sized_by_micro_batch)
    assert tight.recipe.stages["base"].shard.micro_batch == 4, "a divisor of the share"
    assert tight.recipe.stages["sft"].shard.micro_batch == 16, "what is written stays"
    assert tight.reasons["base"]["micro_batch"].startswith("micro-batch 4: 4.0 of 7.0 GiB in each worker; 8 would")
    again = load_recipe(RECIPES / "quickstart.yaml", ["cluster.workers=2"]).recipe
    assert keep_settled(again, tight.recipe).stages["base"].shard.micro_batch == 4
    other = load_recipe(RECIPES / "quickstart.yaml", ["cluster.workers=4"]).recipe
    assert keep_settled(other, tight.recipe).stages["base"].shard.micro_batch == "auto", "no part of a share of two"
