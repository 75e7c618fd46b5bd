"""Models of folders and the hub: planned by their configuration alone, copied into the store when a run starts."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from launch import api
from launch.capacity.workers import Workers
from launch.inputs.external import take_in
from launch.inputs.resolve import resolve
from launch.inputs.resolved import Resolved
from launch.report.show import plan_notes
from recipes.errors import RecipeError, RequestError
from recipes.loading.load import load_recipe
from recipes.models.folders import read_folder
from recipes.planning.settle import Hardware
from trainers.store.store import Store

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LOCAL = ("stages.chat.init_from=./model", "stages.eval.of=[base]")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


@pytest.fixture
def folder(recipe: Path) -> Path:
    """A stock llama beside the recipe."""
    place = recipe.parent / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=64, **SIZES, **IDS)).save_pretrained(place)
    write_tokenizer(place)
    read_folder.cache_clear()
    return place


def write_tokenizer(place: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))


def resolved_of(recipe: Path, store: Store, *overrides: str, fetches: bool = False) -> Resolved:
    loaded = load_recipe(recipe, overrides)
    return resolve(loaded, store, Workers(1, 0), Hardware(), fetches=fetches)


def files_of(store: Store) -> list[Path]:
    return [path for path in Path(store.uri.removeprefix("file://")).rglob("*") if path.is_file()]


def test_a_folder_is_planned_without_a_copy_and_taken_in_when_a_run_starts(
    recipe: Path, store: Store, folder: Path
) -> None:
    before = files_of(store)
    resolved = resolved_of(recipe, store, *LOCAL)
    planned = {stage.name: stage for stage in resolved.plan(store).stages}
    assert files_of(store) == before
    sizes = planned["chat"].sizes
    assert sizes is not None
    assert sizes.parameters == LlamaForCausalLM.from_pretrained(folder).num_parameters()
    assert planned["base"].sizes is not None
    assert planned["base"].sizes.parameters != sizes.parameters, "each stage is counted by its own start"
    api.new_record(store, resolved)
    artifact = store.find_artifact(resolved.external["chat"]["init_from"].fingerprint)
    assert artifact == resolved.external["chat"]["init_from"]
    assert resolved_of(recipe, store, *LOCAL).external == resolved.external


def test_a_folder_that_changes_while_a_run_starts_is_refused(recipe: Path, store: Store, folder: Path) -> None:
    resolved = resolved_of(recipe, store, *LOCAL)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"stages\.chat\.init_from: \./model has changed"):
        take_in(resolved.recipe, resolved.base_dir, resolved.external, store)


def test_adapters_take_less_than_the_whole(recipe: Path, store: Store, folder: Path) -> None:
    def sizes(*overrides: str) -> Any:
        resolved = resolved_of(recipe, store, *LOCAL, *overrides)
        return next(stage.sizes for stage in resolved.plan(None).stages if stage.name == "chat")

    full, light = sizes(), sizes("stages.chat.lora={r: 2}")
    assert light.trainable_parameters < full.trainable_parameters / 4
    assert light.state_bytes < full.state_bytes / 4


def test_a_bare_encoder_gets_a_head_and_the_plan_says_so(recipe: Path, store: Store) -> None:
    place = recipe.parent / "bare"
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=64, **SIZES)).save_pretrained(place)
    write_tokenizer(place)
    (place / "tokenizer_config.json").write_text(
        json.dumps({"sep_token": "<eos>", "pad_token": "<pad>", "mask_token": "a"})
    )
    read_folder.cache_clear()
    train = "train: {steps: 4, global_batch: 4, sequence_length: 16, optimizer: {lr: 1e-3}}"
    stage = "stages.words={kind: pretrain, init_from: ./bare, data: {source: python-docs}, " + train + "}"
    plan = resolved_of(recipe, store, stage).plan(None)
    assert "./bare (BertModel) has no head: a new one is drawn from the seed (words)" in plan_notes(plan)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub on this machine; the hub itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(hub: Path, folder: Path, revision: str = "main") -> Path:
    """Lay a folder out as the hub's library does."""
    place, commit = hub / "models--org--name", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / revision).write_text(commit)
    (place / "blobs").mkdir()
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, place / "blobs" / f"{number:040x}")
        os.symlink(Path("../../blobs") / f"{number:040x}", snapshot / path.name)
    return snapshot


HUB = "stages.chat.init_from=hf://org/name@main"


def test_a_hub_model_of_the_cache_is_planned_and_taken_in(recipe: Path, store: Store, folder: Path, hub: Path) -> None:
    put_in_cache(hub, folder)
    for fetches in (False, True):
        resolved = resolved_of(recipe, store, HUB, fetches=fetches)
        (chat,) = [stage for stage in resolved.plan(None).stages if stage.name == "chat"]
        assert chat.sizes is not None
        assert chat.notes == ()
    take_in(resolved.recipe, resolved.base_dir, resolved.external, store)
    found = store.find_artifact(resolved.external["chat"]["init_from"].fingerprint)
    assert found is not None
    assert found.source == "hf://org/name@main"


def test_a_hub_model_without_its_weights_is_planned_by_its_configuration(
    recipe: Path, store: Store, folder: Path, hub: Path
) -> None:
    (put_in_cache(hub, folder) / "model.safetensors").unlink()
    plan = resolved_of(recipe, store, HUB).plan(None)
    (chat,) = [stage for stage in plan.stages if stage.name == "chat"]
    assert chat.sizes is not None
    assert chat.sizes.parameters == LlamaForCausalLM.from_pretrained(folder).num_parameters()
    assert chat.notes == ("hf://org/name@main is downloaded when the run starts",)
    with pytest.raises(RecipeError, match="hf://org/name@main"):
        resolved_of(recipe, store, HUB, fetches=True)


def test_a_hub_model_that_is_nowhere_is_named(recipe: Path, store: Store, hub: Path) -> None:
    with pytest.raises(RecipeError, match="hf://org/name@main") as refused:
        resolved_of(recipe, store, HUB)
    (problem,) = refused.value.problems
    assert (problem.code, problem.field) == ("input-not-found", "stages.chat.init_from")


def test_a_real_model_is_planned_in_seconds(recipe: Path, tmp_path: Path, smollm2: Path) -> None:
    store = tmp_path / "new-store"
    overrides = ["cluster.workers=1", f"stages.chat.init_from={smollm2}", "stages.chat.lora={r: 8}"]
    started = time.process_time()
    plan = api.plan(recipe, overrides=overrides, store=str(store))
    assert time.process_time() - started < 3
    (chat,) = [stage for stage in plan.stages if stage.name == "chat"]
    assert chat.sizes is not None
    assert chat.sizes.parameters == 134_515_008
    assert sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) < 1 << 20
