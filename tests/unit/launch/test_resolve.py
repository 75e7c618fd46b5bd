"""From a recipe to fixed inputs: folders that become artifacts, and a number of workers."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from cluster.topology import Node
from launch.capacity.workers import Workers, settle_workers
from launch.checks.memory import check_memory
from launch.inputs.external import take_in
from launch.inputs.resolve import resolve
from recipes.artifact_kinds import ArtifactKind
from recipes.errors import CapacityError, RecipeError
from recipes.loading.load import load_recipe
from recipes.planning.settle import Hardware
from trainers.data.tokenizer import load_tokenization
from trainers.store.manifest import ArtifactManifest, canonical_json, files_digest, sha256_hex
from trainers.store.store import Store


def test_a_folder_with_nothing_but_a_tokenizer_gives_one(recipe: Path, store: Store) -> None:
    folder = recipe.parent / "words"
    folder.mkdir()
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    loaded = load_recipe(recipe, ["stages.base.tokenizer={from: ./words}"])
    resolved = resolve(loaded, store, Workers(1, 0), Hardware())
    artifact = resolved.external["base"]["tokenizer.from"]
    assert artifact.kind == "tokenizer"
    assert resolved.plan(None).stages[0].sizes is not None, "the number of its ids is known"
    take_in(resolved.recipe, resolved.base_dir, resolved.external, store)
    assert load_tokenization(store.folder(artifact, "")).eos_token == "<eos>"


def put_model(store: Store, name: str, config: dict[str, Any], kind: ArtifactKind = "model") -> None:
    """Name an artifact without files, of which only its configuration matters."""
    manifest = ArtifactManifest(
        fingerprint=sha256_hex(canonical_json([name])),
        digest=files_digest({}),
        kind=kind,
        stage="import",
        files={},
        architecture=config,
    )
    store.name_artifact(name, store.put_artifact(manifest).manifest.fingerprint)


TRAIN = "train: {steps: 4, global_batch: 4, sequence_length: 16, optimizer: {lr: 1e-3}}"
PAIRS = "data: {source: python-docs}"
DRAWING = "data: {source: digits}, architecture: {family: ddpm}, train: {steps: 4, global_batch: 4, optimizer: {lr: 1}}"


@pytest.mark.parametrize(
    ("override", "code", "field"),
    [
        ("stages.chat.init_from=store://eyes", None, ""),
        ("stages.chat.init_from=store://clone", "sequence-too-long", "stages.chat.train.sequence_length"),
        ("stages.chat.init_from=store://kinds", "wrong-artifact-kind", "stages.chat.init_from"),
        ("stages.base={kind: pretrain, init_from: store://eyes, data: {source: python-docs}, " + TRAIN + "}",
         "unsupported-family", "stages.base.init_from"),
        ("stages.eval.of=[store://words]", "unsupported-family", "stages.eval.of.0"),
        ("stages.eval.of=[base, store://words]", "unsupported-family", "stages.eval.of.1"),
        ("stages.eval.of=[base, store://clone]", "sequence-too-long", "stages.eval.sequence_length"),
        ("stages.judge={kind: reward, init_from: store://eyes, " + PAIRS + ", " + TRAIN + "}",
         "unsupported-family", "stages.judge.init_from"),
        ("stages.policy={kind: rl, actor: store://words, rewards: {judge: {model: 'store://score'}},"
         " prompts: {source: python-docs}, algorithm: {name: ppo, iterations: 1, optimizer: {lr: 1}}}",
         "unsupported-family", "stages.policy.actor"),
        ("stages.drawing={kind: pretrain, text_encoder: store://eyes, " + DRAWING + "}",
         "unsupported-family", "stages.drawing.text_encoder"),
        ("stages.drawing={kind: pretrain, text_encoder: store://words, " + DRAWING + "}", None, ""),
        ("stages.drawing={kind: pretrain, text_encoder: store://kinds, " + DRAWING + "}", None, ""),
    ],
)  # fmt: skip
def test_models_of_the_store_must_be_of_a_family_that_serves(
    recipe: Path, store: Store, override: str, code: str | None, field: str
) -> None:
    put_model(store, "eyes", {"model_type": "llava", "text_config": {"max_position_embeddings": 64}})
    put_model(store, "words", {"model_type": "bert", "max_position_embeddings": 64})
    put_model(store, "clone", {"model_type": "gpt2", "n_positions": 8})
    put_model(store, "kinds", {"model_type": "bert", "max_position_embeddings": 64}, "text_classifier")
    put_model(store, "score", {"model_type": "gpt2"}, "reward_model")
    (recipe.parent / "rows.jsonl").write_text('{"prompt": "What?", "completion": "A.", "image": "a.png"}\n' * 20)
    Image.new("L", (8, 8)).save(recipe.parent / "a.png")
    image_text = ["stages.chat.data={source: jsonl, files: [rows.jsonl]}", "stages.eval.of=[base]"]
    loaded = load_recipe(recipe, [override, *(image_text if "eyes" in override and "chat" in override else [])])
    if code is None:
        resolve(loaded, store, Workers(1, 0), Hardware())
        return
    with pytest.raises(RecipeError) as refused:
        resolve(loaded, store, Workers(1, 0), Hardware())
    assert (code, field) in [(problem.code, problem.field) for problem in refused.value.problems]


def test_an_adapter_alone_is_no_start(recipe: Path, store: Store) -> None:
    put_model(store, "alone", {"model_type": "llama"}, "adapter")
    loaded = load_recipe(recipe, ["stages.chat.init_from=store://alone"])
    with pytest.raises(RecipeError, match=r"store export .* --merge") as refused:
        resolve(loaded, store, Workers(1, 0), Hardware())
    assert refused.value.codes == ("wrong-artifact-kind",)


@pytest.mark.parametrize(("cpus", "expected"), [(8, 2), (2, 2), (1, None)])
def test_auto_never_settles_below_min_workers(recipe: Path, cpus: int, expected: int | None) -> None:
    loaded = load_recipe(recipe, ["cluster.min_workers=2"])
    nodes = [Node("a", "10.0.0.1", cpus, 0.0, 0, cpus, 0.0)]
    if expected is not None:
        assert settle_workers(loaded.recipe, nodes).num_workers == expected
        return
    with pytest.raises(CapacityError, match=r"min_workers is 2; at most 1 .* 1 CPU worker,"):
        settle_workers(loaded.recipe, nodes)


@pytest.mark.parametrize(("memory_gib", "gpus", "fits"), [(64, 0, True), (2, 0, False), (0, 0, True), (2, 2, True)])
def test_memory_is_compared_with_the_nodes(recipe: Path, store: Store, memory_gib: int, gpus: int, fits: bool) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 12}
    loaded = load_recipe(recipe, [f"stages.base.architecture.{key}={value}" for key, value in wide.items()])
    nodes = [Node(name, "10.0.0.1", 1.0, gpus / 2, memory_gib << 30, 1.0, gpus / 2) for name in ("a", "b")]
    workers = Workers(2, 1 if gpus else 0)
    resolved = resolve(loaded, store, workers, Hardware())
    plan = resolved.plan(store)
    if fits:
        check_memory(resolved, plan, workers, nodes)
        return
    with pytest.raises(CapacityError, match=r"stage base .* GiB .* 2 workers; .* for 0;"):
        check_memory(resolved, plan, workers, nodes)
