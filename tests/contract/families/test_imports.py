"""What `store export` writes of every kind comes back into a store as the same files, and serves as an input again."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.capacity.workers import Workers
from launch.inputs.resolve import resolve
from recipes.errors import RequestError
from recipes.loading.load import load_recipe
from recipes.models.folders import read_folder
from recipes.planning.settle import Hardware
from tests.stages import Case
from trainers.models.imports import describe_folder, import_folder
from trainers.store.export import export
from trainers.store.inspection import verify
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.materialised_folders import files_under
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import PLAIN, run_case_here
from family_stages import CROSSINGS, DIGITS, KIT, TRAIN, TUNED

sys.path.pop(0)

ADAPTED = [name for name in KIT if "lora" in CROSSINGS.get(name, ({},))[0]]
MODELS = [*KIT, *(f"{name}, merged" for name in ADAPTED)]


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every artifact of the kit as a folder, adapters also merged."""
    folder = tmp_path_factory.mktemp("exported")
    store = Store.open(str(finished / "store"))
    for name in MODELS:
        export(store, made_by(store, name), folder / name, merge=name.endswith(", merged"))
    return folder


def made_by(store: Store, name: str) -> ArtifactManifest:
    return store.resolve(name.removesuffix(", merged"))


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back_as_the_same_files(finished: Path, exported: Path, tmp_path: Path, name: str) -> None:
    made = made_by(Store.open(str(finished / "store")), name)
    part = "adapter" if name in ADAPTED else "model"
    store = Store.open(str(tmp_path / "store"))
    described = describe_folder(exported / name)
    assert not (tmp_path / "store").exists(), "nothing is written to say what a folder is"
    found = import_folder(store, exported / name, name="back")
    assert found == described
    wanted = files_under(made.files, part)
    assert files_under(found.files, part) == wanted
    assert found.digest == files_digest({f"{part}/{file}": entry for file, entry in wanted.items()})
    assert found.kind == ("adapter" if part == "adapter" else made.kind)
    assert verify(store).damage == []
    if part == "adapter":
        assert found.base == made.base
        (parent,) = found.parents.values()
        assert store.resolve(parent.fingerprint).digest == found.base
    again = export(store, store.resolve("back"), tmp_path / "again")
    for path in (path for path in (exported / name).rglob("*") if path.is_file()):
        twin = again / path.relative_to(exported / name)
        if path.name == "adapter_config.json":
            continue  # it names the folder that it lies in
        assert twin.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_export_is_refused_by_check_and_import(exported: Path, tmp_path: Path, name: str) -> None:
    """Every file of weights cut short, every one missing."""
    weights = [path.relative_to(exported / name) for path in (exported / name).rglob("*.safetensors")]
    assert weights
    for number, path in enumerate(weights):
        for damage in ("cut", "lost"):
            folder = tmp_path / f"{number}-{damage}"
            shutil.copytree(exported / name, folder)
            if damage == "lost":
                (folder / path).unlink()
            else:
                (folder / path).write_bytes((folder / path).read_bytes()[:-4])
            with pytest.raises(RequestError, match=path.stem):
                import_folder(Store.open(str(tmp_path / "store")), folder)
            if name not in ADAPTED:
                assert path.stem in " | ".join(map(str, read_folder(folder, "model").problems))
    assert not list((tmp_path / "store").glob("refs/artifacts/*"))


STARTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "adapted": CROSSINGS["adapted"],
    "classified": CROSSINGS["classified"],
    "captioned": CROSSINGS["captioned"],
    "tuned": TUNED["tuned"],
    "translated": (
        {
            "kind": "finetune",
            "init_from": "encoder_decoder",
            "data": {"source": "jsonl", "files": ["targets.jsonl"], "hold_out": 0.2},
            "train": {**TRAIN, "sequence_length": 32},
        },
        {"init_from": "encoder_decoder"},
    ),
}
"""Stages that start from each kind of model, with their inputs by field path."""


@pytest.mark.parametrize("name", STARTS)
def test_a_stage_starts_from_what_came_back(finished: Path, exported: Path, tmp_path: Path, name: str) -> None:
    spec, inputs = STARTS[name]
    for file in ("labelled.csv", "text.txt"):
        shutil.copy(finished / file, tmp_path / file)
    rows = [{"prompt": f"The number {n}", "completion": f"comes before {n + 1}."} for n in range(40)]
    (tmp_path / "targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store.open(str(tmp_path / "store"))
    for source in inputs.values():
        import_folder(store, exported / source, name=source)
    short = {
        key: {**spec[key], **({"steps": 2, "evaluate_every": 2} if key == "train" else {})}
        for key in ("train",)
        if key in spec
    }
    short |= {"algorithm": {**spec["algorithm"], "iterations": 1}} if "algorithm" in spec else {}
    run_case_here(tmp_path, Case("again", name, {**spec, **short, "shard": PLAIN}, inputs))
    assert json.loads((tmp_path / f"again-{name}.json").read_text())["difference"] < 1e-5


def test_recipes_name_exported_folders(exported: Path, tmp_path: Path) -> None:
    """As diffusions, classifiers and models to measure: checked, and resolved to what an import would commit."""
    drawing = {"kind": "finetune", "family": "ddpm", "init_from": str(exported / "ddpm"), "data": DIGITS}
    tuned = TUNED["tuned"][0] | {
        "actor": str(exported / "ddpm"),
        "reward": {"classifier": str(exported / "classifier")},
    }
    evaluation = {
        "kind": "evaluate",
        "of": [str(exported / name) for name in ("vae", "gan", "captioned")],
        "suites": ["images"],
        "images": DIGITS,
        "features": str(exported / "classifier"),
        "num_images": 24,
    }
    recipe = {
        "name": "folders",
        "cluster": {"workers": 1},
        "stages": {
            "drawing": {**drawing, "train": {"steps": 1, "global_batch": 8, "optimizer": {"lr": 1e-3}}},
            "tuned": tuned,
            "eval": evaluation,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    store = Store.open(str(tmp_path / "store"))
    found = resolve(load_recipe(path), store, Workers(1, 0), Hardware()).external
    assert found["drawing"]["init_from"] == describe_folder(exported / "ddpm")
    assert found["eval"]["features"].kind == "classifier"
