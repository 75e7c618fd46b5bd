"""From a recipe to fixed inputs: folders that become artifacts, and a number of workers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from cluster.topology import Node
from launch.capacity import Workers, check_memory, settle_workers
from launch.resolve import resolve
from recipes.errors import CapacityError
from recipes.load import load_recipe
from trainers.data.tokenizer import load_tokenization
from trainers.store.store import Store


def test_a_folder_with_nothing_but_a_tokenizer_gives_one(recipe: Path, store: Store) -> None:
    folder = recipe.parent / "words"
    folder.mkdir()
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    loaded = load_recipe(recipe, ["stages.base.tokenizer={from: ./words}"])
    artifact = resolve(loaded, store, workers=1, gpus_per_worker=0).external["base"]["tokenizer.from"]
    assert artifact.kind == "tokenizer"
    assert load_tokenization(store.folder(artifact, "")).eos_token == "<eos>"


@pytest.mark.parametrize(("cpus", "expected"), [(8, 2), (2, 2), (1, None)])
def test_auto_never_settles_below_min_workers(recipe: Path, cpus: int, expected: int | None) -> None:
    loaded = load_recipe(recipe, ["cluster.min_workers=2"])
    nodes = [Node("a", "10.0.0.1", cpus, 0.0, 0, cpus, 0.0)]
    if expected is not None:
        assert settle_workers(loaded.recipe, nodes).num_workers == expected
        return
    with pytest.raises(CapacityError, match=r"min_workers is 2; at most 1 can be had: there is room for 1 CPU worker,"):
        settle_workers(loaded.recipe, nodes)


@pytest.mark.parametrize(("memory_gib", "gpus", "fits"), [(64, 0, True), (2, 0, False), (0, 0, True), (2, 2, True)])
def test_memory_is_compared_with_the_nodes(recipe: Path, store: Store, memory_gib: int, gpus: int, fits: bool) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 12}
    loaded = load_recipe(recipe, [f"stages.base.architecture.{key}={value}" for key, value in wide.items()])
    nodes = [Node(name, "10.0.0.1", 1.0, gpus / 2, memory_gib << 30, 1.0, gpus / 2) for name in ("a", "b")]
    workers = Workers(2, 1 if gpus else 0)
    plan = resolve(loaded, store, workers=2, gpus_per_worker=workers.gpus_per_worker).plan(store)
    if fits:
        check_memory(plan, workers, nodes)
        return
    with pytest.raises(CapacityError, match=r"stage base takes about .* GiB of memory in each of 2 workers; .* for 0;"):
        check_memory(plan, workers, nodes)
