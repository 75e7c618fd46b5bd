"""What `check` says of the images that a stage compares, and of the labels of those whose captions it reads: the rules
of the workers, on the first rows of the files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.checks.preflight import check
from launch.inputs.data_check import load_checked
from recipes.errors import RecipeError

RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "image"


def problems(folder: Path, stages: str) -> set[tuple[str, str]]:
    """Check the shipped recipe with other sources; returns field and code of every problem."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"extends: {RECIPES / 'captions_ddpo.yaml'}\nstages: {stages}\n")
    try:
        load_checked(recipe)
    except RecipeError as error:
        return {(problem.field, problem.code.value) for problem in error.problems}
    return set()


def write_images(folder: Path, classes: list[str]) -> None:
    for number, name in enumerate(classes):
        place = folder / "images" / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"a {name}")


@pytest.mark.parametrize(
    ("classes", "reward", "wanted"),
    [
        (["7", "3", "7"], "", set()),
        (["7", "cat"], "", {("stages.policy.reward.label", "unknown-class")}),
        (["7", "cat"], "reward: {label: '7'}, ", set()),
    ],
)
def test_the_classifier_knows_the_classes_of_the_captions(
    tmp_path: Path, classes: list[str], reward: str, wanted: set[tuple[str, str]]
) -> None:
    write_images(tmp_path, classes)
    prompts = "{source: image-folder, path: images, captions: beside, hold_out: 0}"
    assert problems(tmp_path, f"{{policy: {{{reward}prompts: {prompts}}}}}") == wanted


def test_captions_need_labels_where_the_reward_does(tmp_path: Path) -> None:
    write_images(tmp_path, ["7", "3"])
    prompts = "{source: image-folder, path: images, captions: beside, labels: none, hold_out: 0}"
    assert problems(tmp_path, f"{{policy: {{prompts: {prompts}}}}}") == {
        ("stages.policy.prompts.labels", "missing-labels")
    }


@pytest.mark.parametrize(("count", "wanted"), [(3, {("stages.eval.images", "too-few-samples")}), (19, set())])
def test_there_are_images_to_compare(tmp_path: Path, count: int, wanted: set[tuple[str, str]]) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    (tmp_path / "a.csv").write_text("caption\n" + "a seven\n" * count)
    source = "{source: arrays, files: [a.npz], caption_files: [a.csv], hold_out: 0.5}"
    assert problems(tmp_path, f"{{eval: {{images: {source}}}}}") == wanted


def test_columns_of_images_that_nothing_reads_are_named(tmp_path: Path) -> None:
    rows = [{"image": [[0, 255], [255, number]], "label": number % 2, "taken": "2020"} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": "jsonl", "files": ["rows.jsonl"], "size": 8, "channels": 1}
    stage = {"kind": "pretrain", "architecture": {"family": "vae"}, "data": source, "evaluation": source}
    train = {"steps": 2, "global_batch": 2, "optimizer": {"lr": 1e-3}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "a", "stages": {"vae": {**stage, "train": train}}}))
    found = check(tmp_path / "recipe.yaml")
    assert not found.problems
    assert [(row.field, row.unread) for row in found.rows] == [
        (field, {"label": 4, "taken": 4}) for field in ("data", "evaluation")
    ]
