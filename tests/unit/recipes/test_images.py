"""Recipes of image models: what fits together, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.loading.load import load_recipe
from recipes.models.families import FAMILIES
from recipes.recipe import Recipe

ProblemsOf = Callable[..., list[tuple[str, str]]]

TEXT = """\
name: images
cluster: {workers: 2}
stages:
  vae:
    kind: pretrain
    architecture: {family: vae, type: autoencoder_kl, width: 8, depth: 2, latent: 4}
    data: {source: digits, hold_out: 0.2}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
  latent:
    kind: pretrain
    autoencoder: vae
    architecture: {family: ddpm, class_conditional: true, guidance: 2.0}
    data: {source: digits, hold_out: 0.2}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
  gan:
    kind: pretrain
    architecture: {family: gan}
    data: {source: digits}
    train: {epochs: 2, global_batch: 8, optimizer: {lr: 1e-3}}
    shard: {zero: 2}
  judge:
    kind: pretrain
    architecture: {family: classifier}
    data: {source: digits, hold_out: 0.2}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
  eval:
    kind: evaluate
    of: [latent, gan]
    suites: [images]
    features: judge
    images: {source: digits, hold_out: 0.2}
    gates: [{metric: gan.coverage, min: 0.5}]
"""


def test_the_recipe_is_right_and_names_its_inputs(recipe_of: Callable[..., Recipe]) -> None:
    stages = recipe_of(TEXT).stages
    assert [item.wants for item in stages["latent"].inputs()] == [("vae",)]
    assert [(item.field_path, item.wants[-1]) for item in stages["eval"].inputs()] == [
        ("of.0", "ddpm"),
        ("of.1", "ddpm"),
        ("features", "classifier"),
    ]
    assert stages["gan"].outputs() == {"model": "gan"}
    assert [(use.field_path, use.held_out) for use in stages["vae"].sources()] == [
        ("data", False),
        ("evaluation", True),
    ]
    assert [use.role for use in stages["eval"].sources()] == ["images"]


@pytest.mark.parametrize(
    ("edits", "fields"),
    [
        (
            [("{family: ddpm, ", "{family: ddpm, norm_num_groups: 7, attention_levels: [3], sampling_steps: 5000, ")],
            {"stages.latent.architecture"},
        ),
        (
            [
                ("depth: 2, latent: 4}", "likelihood: gauss}"),
                ("data: {source: digits, hold_out: 0.2}", "data: {source: idx, files: [no.gz]}"),
                ("global_batch: 8", "global_batch: 9"),
            ],
            {"stages.vae.architecture.likelihood", "stages.vae.data.files.0", "stages.vae.train.global_batch"},
        ),
        (
            [
                ("of: [latent, gan]", "of: [latent, gann]"),
                ("images: {source: digits, hold_out: 0.2}", "images: {source: idx, files: [no.gz]}"),
            ],
            {"stages.eval", "stages.eval.of.1", "stages.eval.images.files.0"},
        ),
        (
            [("gan.coverage", "gan.coverag"), ("images: {source: digits, hold_out: 0.2}", "images: {source: digits}")],
            {"stages.eval", "stages.eval.gates.0.metric"},
        ),
        (
            [("steps: 20", "steps: many"), ("autoencoder: vae", "autoencoder: vea"), ("family: gan}", "type: gan}")],
            {"stages.vae.train.steps", "stages.latent.autoencoder", "stages.gan.architecture.family"},
        ),
    ],
)
def test_a_stage_with_an_error_is_checked_on(
    problems_of: ProblemsOf, edits: list[tuple[str, str]], fields: set[str]
) -> None:
    assert {field for _, field in problems_of(TEXT, *edits)} == fields


def test_everything_between_the_fields_of_one_mapping_is_found_at_once(problems_of: ProblemsOf) -> None:
    wrong = "{family: ddpm, norm_num_groups: 7, attention_levels: [3], sampling_steps: 5000, "
    found = problems_of(TEXT, ("{family: ddpm, ", wrong))
    assert found == [
        (code, "stages.latent.architecture") for code in ("not-divisible", "out-of-range", "too-many-steps")
    ]


def test_an_unknown_stage_is_told_once(problems_of: ProblemsOf) -> None:
    edit = ("of: [latent, gan]", "of: [latent, gann]")
    assert problems_of(TEXT, edit) == [("unknown-stage", "stages.eval.of.1")]


def test_a_language_model_in_an_evaluation_of_images_is_told_once(problems_of: ProblemsOf) -> None:
    words = """\
  words:
    kind: pretrain
    architecture: {family: encoder, type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4,
                   intermediate_size: 64}
    tokenizer: {train: bpe, vocab_size: 400, cls_token: "<|cls|>", mask_token: "<|mask|>"}
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
"""
    edit = ("of: [latent, gan]", "of: [words, gan]")
    assert problems_of(TEXT + words, edit) == [("wrong-artifact-kind", "stages.eval.of.0")]


def test_every_family_has_a_shipped_recipe() -> None:
    folder = Path(__file__).parents[3] / "recipes"
    shipped = {
        stage.architecture.family
        for path in sorted(folder.glob("*/*.yaml"))
        for stage in load_recipe(path).recipe.stages.values()
        if getattr(stage, "architecture", None) is not None
    }
    assert shipped == set(FAMILIES)


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        (
            "features: judge",
            "features: vae",
            "wrong-artifact-kind",
            "stages.eval.features",
        ),
        ("of: [latent, gan]", "of: [latent, judge]", "wrong-artifact-kind", "stages.eval.of.1"),
        ("autoencoder: vae", "autoencoder: gan", "wrong-artifact-kind", "stages.latent.autoencoder"),
        ("type: autoencoder_kl", "type: mlp", "unsupported-autoencoder", "stages.latent.autoencoder"),
        (
            "family: gan}",
            "family: gann}",
            "unknown-choice",
            "stages.gan.architecture.family",
        ),
        ("family: gan}", "type: mlp}", "missing-key", "stages.gan.architecture.family"),
        (
            "architecture: {family: gan}",
            "architecture: gan",
            "missing-key",
            "stages.gan.architecture.family",
        ),
        (
            "    architecture: {family: gan}\n",
            "",
            "missing-key",
            "stages.gan.architecture.family",
        ),
        (
            "global_batch: 8, optimizer: {lr: 1e-3}}\n    shard",
            "batch: 8, optimizer: {lr: 1e-3}}\n    shard",
            "unknown-key",
            "stages.gan.train.batch",
        ),
        ("family: gan}", "family: gan}\n    init_from: ./x", "unknown-key", "stages.gan.init_from"),
        ("family: gan}", "family: gan, latents: 3}", "unknown-key", "stages.gan.architecture.latents"),
        ("guidance: 2.0", "guidance: 2.0, label_dropout: 0", "unmet-requirement", "stages.latent.architecture"),
        ("class_conditional: true, ", "", "unmet-requirement", "stages.latent"),
        ("family: classifier", "family: ddpm, norm_num_groups: 7", "not-divisible", "stages.judge.architecture"),
        ("shard: {zero: 2}", "shard: {zero: 3}", "out-of-range", "stages.gan.shard.zero"),
        (
            "shard: {zero: 2}",
            "shard: {zero: 2, gradient_checkpointing: true}",
            "not-applicable",
            "stages.gan.shard.gradient_checkpointing",
        ),
        ("data: {source: digits}", "data: {source: idx, files: [no.gz]}", "missing-file", "stages.gan.data.files.0"),
        (
            "data: {source: digits}",
            "data: {source: image-folder, path: nowhere}",
            "missing-folder",
            "stages.gan.data.path",
        ),
        ("data: {source: digits}", "data: {source: image-folder, path: .}", "missing-images", "stages.gan.data.path"),
        (
            "data: {source: digits}",
            "data: {source: idx, files: [recipe.yaml]}",
            "invalid-data-format",
            "stages.gan.data.files.0",
        ),
        (
            "data: {source: digits}",
            "data: {source: arrays, files: [recipe.yaml]}",
            "invalid-data-format",
            "stages.gan.data.files.0",
        ),
        (
            "{family: classifier}\n    data: {source: digits,",
            "{family: classifier}\n    data: {source: datasets, path: org/x, revision: a,",
            "missing-labels",
            "stages.judge.data.label",
        ),
        (
            "guidance: 2.0}\n    data: {source: digits, hold_out: 0.2}",
            "guidance: 2.0}\n    data: {source: idx, files: [no.gz]}",
            "missing-labels",
            "stages.latent.data.label_files",
        ),
        (
            "{family: gan}\n    data: {source: digits}",
            "{family: gan, class_conditional: true}\n    data: {source: image-folder, path: ., labels: none}",
            "missing-labels",
            "stages.gan.data.labels",
        ),
        (
            "{family: classifier}\n",
            "{family: classifier}\n    evaluation: {source: arrays, files: [x.npz]}\n",
            "missing-labels",
            "stages.judge.evaluation.labels",
        ),
        (
            "  judge:\n",
            "  tuned:\n    kind: finetune\n    family: ddpm\n    init_from: latent\n"
            "    data: {source: jsonl, files: [x.jsonl]}\n"
            "    train: {steps: 9, global_batch: 8, optimizer: {lr: 1e-3}}\n  judge:\n",
            "missing-labels",
            "stages.tuned.data.label",
        ),
        ("suites: [images]", "suites: [images, perplexity]", "conflicting-keys", "stages.eval"),
        ("    features: judge\n", "", "missing-key", "stages.eval"),
        (
            "images: {source: digits,",
            "images: {source: digits, limit: 1,",
            "too-few-samples",
            "stages.eval.images.limit",
        ),
        ("metric: gan.coverage", "metric: gan.win_rate", "unknown-metric", "stages.eval.gates.0.metric"),
        ("depth: 2, latent: 4}", "depth: 5, latent: 4}", "size-not-divisible", "stages.vae.architecture.depth"),
        (
            "depth: 2, latent: 4}",
            "depth: 4, latent: 4}",
            "size-not-divisible",
            "stages.latent.architecture.block_out_channels",
        ),
        (
            "    autoencoder: vae\n    architecture: {family: ddpm, ",
            "    architecture: {family: ddpm, block_out_channels: [8, 8, 8, 8, 8], ",
            "size-not-divisible",
            "stages.latent.architecture.block_out_channels",
        ),
        ("latent: 4}", "latent: 4, kl_warmup_steps: 99}", "warmup-too-long", "stages.vae.architecture.kl_warmup_steps"),
        (
            "latent: 4}",
            "latent: 4, likelihood: gaussian, binarize: true}",
            "unmet-requirement",
            "stages.vae.architecture",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    assert (code, field) in problems_of(TEXT, (old, new))
