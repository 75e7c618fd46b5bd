"""Recipes of text to image: what fits together, and what is said where it does not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recipes.data.image_facts import PictureFacts
from recipes.planning.plan import build_plan
from recipes.recipe import Recipe
from recipes.references import stage_inputs, stage_parts
from recipes.stages.kinds import Finetune, FinetuneImages

TEXT = """\
name: captions
cluster: {workers: 2}
stages:
  words:
    kind: pretrain
    architecture: {family: decoder, type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 64}
    tokenizer: {train: bpe, vocab_size: 400}
    data: {source: python-docs, split: train}
    train: {steps: 20, global_batch: 8, sequence_length: 32, optimizer: {lr: 1e-3}}
  lstm:
    kind: pretrain
    architecture: {family: rnn, type: lstm, hidden_size: 32, num_hidden_layers: 1}
    tokenizer: {train: bpe, vocab_size: 400}
    data: {source: python-docs, split: train}
    train: {steps: 20, global_batch: 8, sequence_length: 32, optimizer: {lr: 1e-3}}
  drawing:
    kind: pretrain
    text_encoder: words
    architecture: {family: ddpm, guidance: 3.0}
    data: {source: digits, hold_out: 0.2}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
  tuned:
    kind: finetune
    family: ddpm
    init_from: drawing
    lora: {r: 4, target_modules: [to_q, to_out.0]}
    data: {source: digits}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
  judge:
    kind: pretrain
    architecture: {family: classifier}
    data: {source: digits}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
  chat:
    kind: finetune
    init_from: words
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 32, optimizer: {lr: 1e-3}}
  exam:
    kind: evaluate
    of: [tuned]
    suites: [images]
    features: judge
    images: {source: digits, hold_out: 0.3}
"""


def test_the_recipe_is_right_and_names_its_inputs(recipe_of: Callable[..., Recipe]) -> None:
    stages = recipe_of(TEXT).stages
    assert isinstance(stages["tuned"], FinetuneImages)
    assert isinstance(stages["chat"], Finetune)
    assert [(item.field_path, item.wants) for item in stage_inputs(stages["drawing"])] == [
        ("text_encoder", ("model", "text_classifier"))
    ]
    assert [(item.field_path, item.wants) for item in stage_inputs(stages["tuned"])] == [("init_from", ("ddpm",))]
    assert stage_parts(stages["tuned"]) == {"model": "ddpm", "adapter": "adapter"}


def test_memory_of_a_diffusion_counts_its_text_encoder_and_adapters(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(TEXT)
    pictures = {name: PictureFacts(1, 8, 8) for name in ("drawing", "tuned", "judge")}
    data = {name: {"data": "0" * 64} for name in recipe.stages}
    sizes = {stage.name: stage.sizes for stage in build_plan(recipe, workers=2, data=data, pictures=pictures).stages}
    words, drawing, tuned = sizes["words"], sizes["drawing"], sizes["tuned"]
    assert words is not None
    assert drawing is not None
    assert tuned is not None
    assert drawing.parameters == drawing.trainable_parameters + words.parameters
    assert tuned.parameters == drawing.parameters + tuned.trainable_parameters
    assert tuned.trainable_parameters < drawing.trainable_parameters / 20


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("text_encoder: words", "text_encoder: lstm", "a model of family rnn reads no captions"),
        (
            "text_encoder: words",
            "text_encoder: judge",
            "needs a language model or a text classifier, but judge (pretrain) is an image",
        ),
        ("text_encoder: words", "text_encoder: drawing", "a stage cannot take its own output"),
        ("text_encoder: words", "text_encoder: wordz", "did you mean words?"),
        ("{family: ddpm, guidance: 3.0}", "{family: vae}", "text_encoder serves family ddpm; the family here is vae"),
        ("guidance: 3.0", "guidance: 3.0, class_conditional: true", "give text_encoder or class_conditional: true"),
        ("    text_encoder: words\n", "", "guidance needs class_conditional: true, or a text_encoder"),
        ("guidance: 3.0", "guidance: 3.0, label_dropout: 0", "trained without their condition"),
        (
            "    data: {source: digits}\n    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}\n  judge",
            "    data: {source: datasets, path: org/x, revision: a}\n"
            "    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}\n  judge",
            "stages.tuned.data.caption: these pictures have no captions, which drawing reads; set caption",
        ),
        (
            "images: {source: digits, hold_out: 0.3}",
            "images: {source: datasets, path: org/x, revision: a, hold_out: 0.3}",
            "stages.exam.images.caption: these pictures have no captions, which tuned reads",
        ),
        (
            "  exam:\n",
            "  policy: {kind: ppo, actor: tuned, reward: {rule: ink}, ppo: {estimator: ddpo, iterations: 1,\n"
            "    optimizer: {lr: 1e-3}}}\n  exam:\n",
            "stages.policy.prompts: the actor draws from captions: say whose",
        ),
        ("init_from: drawing", "init_from: words", "needs a diffusion model, but words (pretrain) is a language model"),
        ("to_out.0]", "to_out]", "stages.tuned.lora.target_modules.1: adapters go on the linear modules"),
        ("to_out.0]", "to_out]", "did you mean to_out.0?"),
        ("    family: ddpm\n", "    family: gan\n", "stages.tuned.family: must be ddpm (found 'gan')"),
        ("    family: ddpm\n", "", "stages.tuned.train.sequence_length: the key is required"),
        ("    family: ddpm\n", "", "datasets (found 'digits'); belongs to family: ddpm"),
        (
            "hold_out: 0.2}",
            "hold_out: 0.2, caption: x}",
            "(found 'x'); belongs to source: image-folder, arrays, jsonl,",
        ),
        ("guidance: 3.0", "attention_levels: [0, 2]", "attention_levels: no level 2; there are 0 to 1"),
        (
            "lora: {r: 4, target_modules: [to_q, to_out.0]}\n    data: {source: digits}",
            "data: {source: digits, size: 16, channels: 3}",
            "init_from: its pictures are 8x8 with 1 channel; those of data are 16x16 with 3 channels (found 'drawing')",
        ),
        (
            "images: {source: digits, hold_out: 0.3}",
            "images: {source: digits, size: 9, hold_out: 0.3}",
            "stages.exam.features: its pictures are 8x8 with 1 channel; those of images are 9x9",
        ),
    ],
)
def test_what_does_not_fit_is_said(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    assert said in problems_of(TEXT, (old, new))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "{source: idx, files: [a.gz]}",
            "stages.drawing.data.source: these pictures have no captions, which text_encoder reads",
        ),
        (
            "{source: image-folder, path: pictures, captions: beside}",
            "a.png has no text file beside it (found 'beside'); write a.txt",
        ),
        (
            "{source: arrays, files: [tiles.npz], images: tiles, caption_files: [recipe.yaml]}",
            "tiles.npz: no array 'tiles' (found 'tiles.npz'); arrays there: images",
        ),
        ("{source: image-folder, path: empty, captions: metadata}", "the folder holds no pictures"),
        (
            "{source: arrays, files: [recipe.yaml], caption_files: [recipe.yaml, recipe.yaml]}",
            "one file for each of the 1 in files",
        ),
        ("{source: arrays, files: [recipe.yaml], caption_files: [recipe.yaml]}", "recipe.yaml: no column 'caption'"),
        ("{source: jsonl, files: [recipe.yaml], caption: text}", "recipe.yaml:1: not JSON"),
    ],
)
def test_what_a_source_of_captions_lacks_is_said(
    problems_of: Callable[..., str], tmp_path: Path, source: str, said: str
) -> None:
    for name in ("pictures", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    np.savez(tmp_path / "tiles.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert said in problems_of(TEXT, ("{source: digits, hold_out: 0.2}", source))
