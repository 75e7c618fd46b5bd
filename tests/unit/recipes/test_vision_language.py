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
    """Write rows, a picture and the folder of a model as far as it is looked at."""
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


def test_the_recipe_is_right(problems_of: Callable[..., str]) -> None:
    assert problems_of(TEXT) == ""


def test_the_smoke_form_keeps_room_for_pictures(recipe_of: Callable[..., Recipe]) -> None:
    stages = recipe_of(TEXT.replace("64", "120"), smoke=True).stages
    assert [stage.train.sequence_length for stage in stages.values()] == [120, 32]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, QUESTION], "rows.jsonl:2: no column 'images' or 'image'; the row has 'prompt', 'completion'"),
        ([{**GOOD, "images": ["b.png"]}], "rows.jsonl:1: picture 'b.png' does not exist"),
        ([{**GOOD, "images": ["recipe.yaml"]}], "recipe.yaml is not readable as a picture: no picture that Pillow"),
        ([{**GOOD, "images": ["cut.png"]}], "cut.png is not readable as a picture"),
        ([{**GOOD, "images": ["https://a/b.png"]}], "is a URL; nothing is downloaded"),
        ([{**GOOD, "images": []}], "none of the first 20 rows has a picture"),
        ([GOOD, {**GOOD, "images": []}], ""),
    ],
)
def test_rows(problems_of: Callable[..., str], tmp_path: Path, rows: list[Any], said: str) -> None:
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    write_rows(tmp_path, *rows)
    found = problems_of(TEXT)
    assert said in found
    assert bool(said) == bool(found)


def test_rows_of_files_with_other_cells(problems_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("what?;one;a.png\nwhat?;two;b.png\n")
    csv = '{source: csv, files: [rows.csv], delimiter: ";", header: [prompt, completion, image]}'
    found = problems_of(TEXT, ("{source: jsonl, files: [rows.jsonl]}", csv))
    assert "rows.csv:2: picture 'b.png' does not exist" in found
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert problems_of(TEXT, ("{source: jsonl, files: [rows.jsonl]}", csv)) == ""


def test_what_cannot_be_read_is_told_once(problems_of: Callable[..., str], tmp_path: Path) -> None:
    rows = pyarrow.table({"image": ["a.png"] * 1000, "prompt": ["Which?"] * 1000, "completion": ["Two."] * 1000})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet", use_dictionary=False, compression="gzip")
    edit = ("{source: jsonl, files: [rows.jsonl]}", "{source: parquet, files: [rows.parquet]}")
    whole = (tmp_path / "rows.parquet").read_bytes()
    assert problems_of(TEXT, edit) == ""
    (tmp_path / "rows.parquet").write_bytes(whole[:4] + b"\0" * 100 + whole[104:])
    assert problems_of(TEXT, edit).count("rows.parquet: the first rows cannot be read") == 1
    (tmp_path / "rows.parquet").write_bytes(whole[:-20])
    assert problems_of(TEXT, edit).count("rows.parquet is not a Parquet file") == 1
    assert problems_of(TEXT, ("[rows.jsonl]", '["**.jsonl"]')).count("not a usable pattern") == 1


def test_a_missing_column_of_pictures_is_told_once(problems_of: Callable[..., str]) -> None:
    found = problems_of(TEXT, ("files: [rows.jsonl]", "files: [rows.jsonl], columns: {images: pic}"))
    assert found.count("rows.jsonl:1") == 1
    assert "no column 'pic' (mapped to images)" in found


def test_a_source_without_pictures_is_told_once(problems_of: Callable[..., str]) -> None:
    found = problems_of(TEXT, ("{source: jsonl, files: [rows.jsonl]}", "{source: python-docs}"))
    assert found.count("rows of this source have no pictures") == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sequence_length: 64", "sequence_length: 17", "one picture takes 16 tokens of this model"),
        ("sequence_length: 64", "sequence_length: 200", "longer than the model: ./model/config.json's length is 128"),
        ("parts: [language, projector]", "parts: [langage]", "language"),
        ("[q_proj, v_proj]", "[q_porj]", "did you mean q_proj?"),
        ("kind: finetune\n    init_from: see", "kind: reward\n    init_from: see", "family vision_language"),
        ("kind: finetune\n    init_from: see", "kind: pretrain\n    init_from: see", "takes no vision-language model"),
        ("{source: jsonl, files: [rows.jsonl]}", "{source: python-docs}", "rows of this source have no pictures"),
    ],
)
def test_what_does_not_fit_is_said(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    assert said in problems_of(TEXT, (old, new))


def test_an_evaluation_and_ppo_take_none(problems_of: Callable[..., str]) -> None:
    exam = "  exam: {kind: evaluate, of: [see]}\n"
    assert "stages.exam.of.0: an evaluate stage takes no vision-language model" in problems_of(TEXT + exam)
    ppo = """\
  policy:
    kind: ppo
    actor: see
    reward: store://judge
    prompts: {source: python-docs}
    rollout: {prompts_per_iteration: 8, max_prompt_tokens: 32, max_new_tokens: 32}
    ppo: {iterations: 4, mini_batches: 2, kl_coef: 0.05, optimizer: {lr: 1e-4}}
"""
    assert "a ppo stage needs a decoder; this model is of family vision_language" in problems_of(TEXT + ppo)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"text_config": {"model_type": "gemma"}}, "text_config.model_type 'gemma' is not one of llama"),
        ("config.json", {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type 'pixtral' is not one"),
        ("config.json", {"image_token_index": 9}, "stand at token 9; the tokenizer numbers it 2: <image>"),
        ("processor_config.json", {"image_token": "<picture>"}, "the tokenizer has no such token: <picture>"),
        ("processor_config.json", {"patch_size": 8}, "writes 4 tokens for a picture, the vision tower gives 16"),
        ("processor_config.json", {"auto_map": {}}, "asks for code of its own"),
        ("processor_config.json", {"image_processor": {}}, "holds an image processor"),
        ("processor_config.json", None, "no processor_config.json"),
    ],
)
def test_folders(problems_of: Callable[..., str], folder: Path, file: str, change: Any, said: str) -> None:
    if change is None:
        (folder / file).unlink()
    else:
        write_json(folder / file, json.loads((folder / file).read_text()) | change)
    assert said in problems_of(TEXT)


def test_a_text_model_takes_no_pictures(problems_of: Callable[..., str], folder: Path) -> None:
    write_json(folder / "config.json", CONFIG["text_config"])
    found = problems_of(TEXT)
    assert "rows.jsonl:1: the row has a picture, but the model is of family decoder" in found
    assert "a model of family decoder has one part" in found
