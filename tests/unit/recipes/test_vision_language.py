"""Recipes that fine-tune a vision-language model: what its folder, its rows and the stages after it must be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from recipes.models.folders import read_folder
from recipes.recipe import Recipe

ProblemsOf = Callable[..., list[tuple[str, str]]]

TEXT = """\
name: eyes
stages:
  see:
    kind: finetune
    init_from: ./model
    lora: {r: 4, target_modules: [q_proj, v_proj]}
    parts: [language, projector]
    data: {source: jsonl, files: [rows.jsonl]}
    train: {steps: 4, global_batch: 4, sequence_length: 64, optimizer: {lr: 1e-3}}
  again:
    kind: finetune
    init_from: see
    data: {source: jsonl, files: [rows.jsonl]}
    train: {steps: 4, global_batch: 4, sequence_length: 32, optimizer: {lr: 1e-3}}
"""
QUESTION = {"prompt": "Which? ", "completion": "Two."}
GOOD = {"images": ["a.png"], **QUESTION}
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 2,
    "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "max_position_embeddings": 128},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
}
PROCESSOR: dict[str, Any] = {
    "processor_class": "LlavaProcessor",
    "patch_size": 4,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
    "image_token": "<image>",
    "image_processor": {"do_center_crop": False, "size": {"height": 16, "width": 16}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    """Write rows, an image and the folder of a model as far as it is looked at."""
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    write_rows(tmp_path, GOOD)
    model = tmp_path / "model"
    model.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<end>", "<image>", "<pad>")])
    tokenizer.save(str(model / "tokenizer.json"))
    write_json(model / "tokenizer_config.json", {"eos_token": "<end>", "pad_token": "<pad>"})
    write_json(model / "config.json", CONFIG)
    write_json(model / "processor_config.json", PROCESSOR)
    save_file({"language_model.model.embed_tokens.weight": np.zeros((4, 2), np.float32)}, model / "model.safetensors")
    read_folder.cache_clear()
    return model


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_rows(folder: Path, *rows: Any) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_recipe_is_right(problems_of: ProblemsOf) -> None:
    assert problems_of(TEXT) == []


def test_the_smoke_form_keeps_room_for_images(recipe_of: Callable[..., Recipe]) -> None:
    stages = recipe_of(TEXT.replace("64", "120"), smoke=True).stages
    assert [stage.train.sequence_length for stage in stages.values()] == [120, 32]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "code", "field"),
    [
        ([GOOD, QUESTION], "missing-column", "stages.see.data.files.0"),
        ([{**GOOD, "images": ["b.png"]}], "unreadable-image", "stages.see.data.files.0"),
        ([{**GOOD, "images": ["recipe.yaml"]}], "unreadable-image", "stages.see.data.files.0"),
        ([{**GOOD, "images": ["cut.png"]}], "unreadable-image", "stages.see.data.files.0"),
        ([{**GOOD, "images": ["https://a/b.png"]}], "unreadable-image", "stages.see.data.files.0"),
        ([{**GOOD, "images": []}], "missing-images", "stages.see.data.source"),
        ([GOOD, {**GOOD, "images": []}], "", ""),
    ],
)
def test_rows(problems_of: ProblemsOf, tmp_path: Path, rows: list[Any], code: str, field: str) -> None:
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    write_rows(tmp_path, *rows)
    found = problems_of(TEXT)
    assert (code, field) in found if code else found == []


def test_rows_of_files_with_other_cells(problems_of: ProblemsOf, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("what?;one;a.png\nwhat?;two;b.png\n")
    csv = '{source: csv, files: [rows.csv], delimiter: ";", header: [prompt, completion, image]}'
    found = problems_of(TEXT, ("{source: jsonl, files: [rows.jsonl]}", csv))
    assert found == [("unreadable-image", "stages.see.data.files.0")]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert problems_of(TEXT, ("{source: jsonl, files: [rows.jsonl]}", csv)) == []


def test_what_cannot_be_read_is_told_once(problems_of: ProblemsOf, tmp_path: Path) -> None:
    rows = pyarrow.table({"image": ["a.png"] * 1000, "prompt": ["Which?"] * 1000, "completion": ["Two."] * 1000})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet", use_dictionary=False, compression="gzip")
    edit = ("{source: jsonl, files: [rows.jsonl]}", "{source: parquet, files: [rows.parquet]}")
    whole = (tmp_path / "rows.parquet").read_bytes()
    assert problems_of(TEXT, edit) == []
    (tmp_path / "rows.parquet").write_bytes(whole[:4] + b"\0" * 100 + whole[104:])
    once = "stages.see.data.files.0"
    assert problems_of(TEXT, edit) == [("invalid-data-format", once)]
    (tmp_path / "rows.parquet").write_bytes(whole[:-20])
    assert problems_of(TEXT, edit) == [("invalid-data-format", once)]
    assert problems_of(TEXT, ("[rows.jsonl]", '["**.jsonl"]')) == [("invalid-path", once)]


def test_a_missing_column_of_images_is_told_once(problems_of: ProblemsOf) -> None:
    found = problems_of(TEXT, ("files: [rows.jsonl]", "files: [rows.jsonl], columns: {images: pic}"))
    assert [field for code, field in found if code == "missing-column"] == ["stages.see.data.files.0"]


def test_a_source_without_images_is_told_once(problems_of: ProblemsOf) -> None:
    found = problems_of(TEXT, ("{source: jsonl, files: [rows.jsonl]}", "{source: python-docs}"))
    assert found == [("unsuitable-source", "stages.see.data.source")]


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        ("sequence_length: 64", "sequence_length: 17", "sequence-too-short", "stages.see.train.sequence_length"),
        ("sequence_length: 64", "sequence_length: 200", "sequence-too-long", "stages.see.train.sequence_length"),
        ("parts: [language, projector]", "parts: [langage]", "unknown-choice", "stages.see.parts.0"),
        ("[q_proj, v_proj]", "[q_porj]", "unknown-module", "stages.see.lora.target_modules.0"),
        (
            "kind: finetune\n    init_from: see",
            "kind: reward\n    init_from: see",
            "unsupported-family",
            "stages.again.init_from",
        ),
        (
            "kind: finetune\n    init_from: see",
            "kind: pretrain\n    init_from: see",
            "unsupported-family",
            "stages.again.init_from",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    assert (code, field) in problems_of(TEXT, (old, new))


def test_an_evaluation_and_ppo_take_none(problems_of: ProblemsOf) -> None:
    evaluation = "  evaluation: {kind: evaluate, of: [see]}\n"
    assert ("unsupported-family", "stages.evaluation.of.0") in problems_of(TEXT + evaluation)
    policy = """\
  policy:
    kind: rl
    actor: see
    rewards: {judge: {model: 'store://judge'}}
    prompts: {source: python-docs}
    rollout: {prompts_per_iteration: 8, max_prompt_tokens: 32, max_new_tokens: 32}
    algorithm: {name: ppo, iterations: 4, mini_batches: 2, kl_coef: 0.05, optimizer: {lr: 1e-4}}
"""
    assert ("unsupported-family", "stages.policy.actor") in problems_of(TEXT + policy)


@pytest.mark.parametrize(
    ("file", "change", "code", "field"),
    [
        ("config.json", {"text_config": {"model_type": "mamba"}}, "unsupported-model", "stages.see.init_from"),
        ("config.json", {"vision_config": {"model_type": "pixtral"}}, "unsupported-model", "stages.see.init_from"),
        ("config.json", {"image_token_index": 9}, "image-token-mismatch", "stages.see.init_from"),
        ("processor_config.json", {"image_token": "<other>"}, "image-token-mismatch", "stages.see.init_from"),
        ("processor_config.json", {"patch_size": 8}, "image-token-mismatch", "stages.see.init_from"),
        ("processor_config.json", {"auto_map": {}}, "remote-code", "stages.see.init_from"),
        ("processor_config.json", {"image_processor": {}}, "missing-model-file", "stages.see.init_from"),
        ("processor_config.json", None, "missing-model-file", "stages.see.init_from"),
    ],
)
def test_folders(problems_of: ProblemsOf, folder: Path, file: str, change: Any, code: str, field: str) -> None:
    if change is None:
        (folder / file).unlink()
    else:
        write_json(folder / file, json.loads((folder / file).read_text()) | change)
    assert (code, field) in problems_of(TEXT)


def test_a_text_model_takes_no_images(problems_of: ProblemsOf, folder: Path) -> None:
    write_json(folder / "config.json", CONFIG["text_config"])
    found = problems_of(TEXT)
    assert ("unexpected-images", "stages.see.data.files.0") in found
    assert ("not-applicable", "stages.see.parts") in found
