"""Recipes of text to image: what fits together, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recipes.data.images import ImageSetFacts
from recipes.planning.plan import build_plan
from recipes.recipe import Recipe
from recipes.stages.finetune import Finetune, FinetuneImages

ProblemsOf = Callable[..., list[tuple[str, str]]]

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
  eval:
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
    assert [(item.field_path, item.wants) for item in stages["drawing"].inputs()] == [
        ("text_encoder", ("model", "text_classifier"))
    ]
    assert [(item.field_path, item.wants) for item in stages["tuned"].inputs()] == [("init_from", ("ddpm",))]
    assert stages["tuned"].outputs() == {"model": "ddpm", "adapter": "adapter"}


def test_memory_of_a_diffusion_counts_its_text_encoder_and_adapters(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(TEXT)
    images = {name: ImageSetFacts(1, 8, 8) for name in ("drawing", "tuned", "judge")}
    data = {name: {"data": "0" * 64} for name in recipe.stages}
    sizes = {stage.name: stage.sizes for stage in build_plan(recipe, workers=2, data=data, images=images).stages}
    words, drawing, tuned = sizes["words"], sizes["drawing"], sizes["tuned"]
    assert words is not None
    assert drawing is not None
    assert tuned is not None
    assert drawing.parameters == drawing.trainable_parameters + words.parameters
    assert tuned.parameters == drawing.parameters
    assert tuned.trainable_parameters < drawing.trainable_parameters / 20


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        ("text_encoder: words", "text_encoder: lstm", "unsupported-family", "stages.drawing.text_encoder"),
        (
            "text_encoder: words",
            "text_encoder: judge",
            "wrong-artifact-kind",
            "stages.drawing.text_encoder",
        ),
        ("text_encoder: words", "text_encoder: drawing", "stage-cycle", "stages.drawing.text_encoder"),
        ("text_encoder: words", "text_encoder: wordz", "unknown-stage", "stages.drawing.text_encoder"),
        ("{family: ddpm, guidance: 3.0}", "{family: vae}", "not-applicable", "stages.drawing"),
        ("guidance: 3.0", "guidance: 3.0, class_conditional: true", "conflicting-keys", "stages.drawing"),
        ("    text_encoder: words\n", "", "unmet-requirement", "stages.drawing"),
        ("guidance: 3.0", "guidance: 3.0, label_dropout: 0", "unmet-requirement", "stages.drawing.architecture"),
        (
            "    data: {source: digits}\n    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}\n  judge",
            "    data: {source: datasets, path: org/x, revision: a}\n"
            "    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}\n  judge",
            "missing-captions",
            "stages.tuned.data.caption",
        ),
        (
            "images: {source: digits, hold_out: 0.3}",
            "images: {source: datasets, path: org/x, revision: a, hold_out: 0.3}",
            "missing-captions",
            "stages.eval.images.caption",
        ),
        (
            "  eval:\n",
            "  policy: {kind: rl, actor: tuned, reward: {rule: ink}, algorithm: {name: ddpo, iterations: 1,\n"
            "    optimizer: {lr: 1e-3}}}\n  eval:\n",
            "missing-key",
            "stages.policy.prompts",
        ),
        ("init_from: drawing", "init_from: words", "wrong-artifact-kind", "stages.tuned.init_from"),
        ("to_out.0]", "to_out]", "unknown-module", "stages.tuned.lora.target_modules.1"),
        ("    family: ddpm\n", "    family: gan\n", "unknown-choice", "stages.tuned.family"),
        ("    family: ddpm\n", "", "missing-key", "stages.tuned.train.sequence_length"),
        ("    family: ddpm\n", "", "unknown-choice", "stages.tuned.data.source"),
        (
            "hold_out: 0.2}",
            "hold_out: 0.2, caption: x}",
            "unknown-key",
            "stages.drawing.data.caption",
        ),
        ("guidance: 3.0", "attention_levels: [0, 2]", "out-of-range", "stages.drawing.architecture"),
        (
            "lora: {r: 4, target_modules: [to_q, to_out.0]}\n    data: {source: digits}",
            "data: {source: digits, size: 16, channels: 3}",
            "image-shape-mismatch",
            "stages.tuned.init_from",
        ),
        (
            "images: {source: digits, hold_out: 0.3}",
            "images: {source: digits, size: 9, hold_out: 0.3}",
            "image-shape-mismatch",
            "stages.eval.features",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    assert (code, field) in problems_of(TEXT, (old, new))


@pytest.mark.parametrize(
    ("source", "code", "field"),
    [
        (
            "{source: idx, files: [a.gz]}",
            "missing-captions",
            "stages.drawing.data.source",
        ),
        (
            "{source: image-folder, path: images, captions: beside}",
            "missing-captions",
            "stages.drawing.data.captions",
        ),
        (
            "{source: arrays, files: [tiles.npz], images: tiles, caption_files: [recipe.yaml]}",
            "missing-column",
            "stages.drawing.data.images",
        ),
        ("{source: image-folder, path: empty, captions: metadata}", "missing-images", "stages.drawing.data.path"),
        (
            "{source: arrays, files: [recipe.yaml], caption_files: [recipe.yaml, recipe.yaml]}",
            "file-count-mismatch",
            "stages.drawing.data.caption_files",
        ),
        (
            "{source: arrays, files: [tiles.npz], caption_files: [recipe.yaml]}",
            "missing-column",
            "stages.drawing.data.caption",
        ),
        ("{source: jsonl, files: [recipe.yaml], caption: text}", "invalid-data-format", "stages.drawing.data.files.0"),
    ],
)
def test_what_a_source_of_captions_lacks_is_named(
    problems_of: ProblemsOf, tmp_path: Path, source: str, code: str, field: str
) -> None:
    for name in ("images", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    np.savez(tmp_path / "tiles.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert (code, field) in problems_of(TEXT, ("{source: digits, hold_out: 0.2}", source))
