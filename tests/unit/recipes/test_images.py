"""Recipes of picture models: what fits together, and what is said where it does not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.loading.load import check_file, load_recipe
from recipes.models.families import FAMILIES
from recipes.recipe import Recipe
from recipes.references import stage_inputs, stage_parts, stage_sources

TEXT = """\
name: pictures
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
  exam:
    kind: evaluate
    of: [latent, gan]
    suites: [images]
    features: judge
    images: {source: digits, hold_out: 0.2}
    gates: [{metric: gan.coverage, min: 0.5}]
"""


def test_the_recipe_is_right_and_names_its_inputs(recipe_of: Callable[..., Recipe]) -> None:
    stages = recipe_of(TEXT).stages
    assert [item.wants for item in stage_inputs(stages["latent"])] == [("vae",)]
    assert [(item.field_path, item.wants[-1]) for item in stage_inputs(stages["exam"])] == [
        ("of.0", "ddpm"),
        ("of.1", "ddpm"),
        ("features", "classifier"),
    ]
    assert stage_parts(stages["gan"]) == {"model": "gan"}
    assert [(use.field_path, use.held_out) for use in stage_sources(stages["vae"])] == [
        ("data", False),
        ("evaluation", True),
    ]
    assert [use.role for use in stage_sources(stages["exam"])] == ["images"]


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
            {"stages.exam", "stages.exam.of.1", "stages.exam.images.files.0"},
        ),
        (
            [("gan.coverage", "gan.coverag"), ("images: {source: digits, hold_out: 0.2}", "images: {source: digits}")],
            {"stages.exam", "stages.exam.gates.0.metric"},
        ),
        (
            [("steps: 20", "steps: many"), ("autoencoder: vae", "autoencoder: vea"), ("family: gan}", "type: gan}")],
            {"stages.vae.train.steps", "stages.latent.autoencoder", "stages.gan.architecture.family"},
        ),
    ],
)
def test_a_stage_with_an_error_is_checked_on(
    problems_of: Callable[..., str], tmp_path: Path, edits: list[tuple[str, str]], fields: set[str]
) -> None:
    said = problems_of(TEXT, *edits)
    _, problems = check_file(tmp_path / "recipe.yaml")
    assert {problem.field for problem in problems} == fields
    if "norm_num_groups" in said:
        assert "must divide block_out_channels (32); attention_levels: no level 3; there are 0 to 1; sampling" in said


def test_an_unknown_stage_is_told_once(problems_of: Callable[..., str]) -> None:
    found = problems_of(TEXT, ("of: [latent, gan]", "of: [latent, gann]"))
    assert found.splitlines() == [found]
    assert "stages.exam.of.1: the recipe has no such stage (found 'gann'); did you mean gan?" in found


def test_a_language_model_in_an_examination_of_pictures_is_told_once(problems_of: Callable[..., str]) -> None:
    words = """\
  words:
    kind: pretrain
    architecture: {family: encoder, type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4,
                   intermediate_size: 64}
    tokenizer: {train: bpe, vocab_size: 400, cls_token: "<|cls|>", mask_token: "<|mask|>"}
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
"""
    found = problems_of(TEXT + words, ("of: [latent, gan]", "of: [words, gan]"))
    assert found.splitlines() == [found]
    assert "stages.exam.of.0: needs a variational autoencoder or" in found


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
    ("old", "new", "said"),
    [
        (
            "features: judge",
            "features: vae",
            "needs an image classifier, but vae (pretrain) is a variational autoencoder",
        ),
        ("of: [latent, gan]", "of: [latent, judge]", "is an image classifier"),
        ("autoencoder: vae", "autoencoder: gan", "needs a variational autoencoder"),
        ("type: autoencoder_kl", "type: mlp", "diffusion needs latents with a height and a width; vae is of type mlp"),
        (
            "family: gan}",
            "family: gann}",
            "must be decoder, encoder, encoder_decoder, rnn, classifier, vae, gan or ddpm",
        ),
        ("family: gan}", "family: gann}", ":17: stages.gan.architecture.family: "),
        ("family: gan}", "family: gann}", "(found 'gann'); did you mean gan?"),
        ("family: gan}", "type: mlp}", "stages.gan.architecture.family: the key is required; one of decoder, "),
        (
            "architecture: {family: gan}",
            "architecture: gan",
            "stages.gan.architecture.family: the key is required; one of ",
        ),
        (
            "    architecture: {family: gan}\n",
            "",
            "stages.gan.architecture.family: the key is required; one of decoder, ",
        ),
        (
            "global_batch: 8, optimizer: {lr: 1e-3}}\n    shard",
            "batch: 8, optimizer: {lr: 1e-3}}\n    shard",
            "stages.gan.train.batch: unknown key",
        ),
        ("family: gan}", "family: gan}\n    init_from: ./x", "stages.gan.init_from: unknown key"),
        ("family: gan}", "family: gan, latents: 3}", "did you mean latent?"),
        ("guidance: 2.0", "guidance: 2.0, label_dropout: 0", "set label_dropout above 0"),
        ("class_conditional: true, ", "", "guidance needs class_conditional: true"),
        ("family: classifier", "family: ddpm, norm_num_groups: 7", "must divide block_out_channels (32)"),
        ("shard: {zero: 2}", "shard: {zero: 3}", "keeps their parameters whole"),
        ("shard: {zero: 2}", "shard: {zero: 2, gradient_checkpointing: true}", "keep their activations"),
        ("data: {source: digits}", "data: {source: idx, files: [no.gz]}", "there is no such file"),
        ("data: {source: digits}", "data: {source: image-folder, path: nowhere}", "there is no such folder"),
        ("data: {source: digits}", "data: {source: image-folder, path: .}", "the folder holds no pictures"),
        ("data: {source: digits}", "data: {source: idx, files: [recipe.yaml]}", "is not an IDX file"),
        (
            "data: {source: digits}",
            "data: {source: arrays, files: [recipe.yaml]}",
            "is neither a .npy nor an .npz file",
        ),
        (
            "{family: classifier}\n    data: {source: digits,",
            "{family: classifier}\n    data: {source: datasets, path: org/x, revision: a,",
            "stages.judge.data.label: these pictures have no labels, which a classifier reads; set label",
        ),
        (
            "guidance: 2.0}\n    data: {source: digits, hold_out: 0.2}",
            "guidance: 2.0}\n    data: {source: idx, files: [no.gz]}",
            "stages.latent.data.label_files: these pictures have no labels, which class_conditional reads",
        ),
        (
            "{family: gan}\n    data: {source: digits}",
            "{family: gan, class_conditional: true}\n    data: {source: image-folder, path: ., labels: none}",
            "stages.gan.data.labels: these pictures have no labels, which class_conditional reads",
        ),
        (
            "{family: classifier}\n",
            "{family: classifier}\n    evaluation: {source: arrays, files: [x.npz]}\n",
            "stages.judge.evaluation.labels: these pictures have no labels",
        ),
        (
            "  judge:\n",
            "  tuned:\n    kind: finetune\n    family: ddpm\n    init_from: latent\n"
            "    data: {source: jsonl, files: [x.jsonl]}\n"
            "    train: {steps: 9, global_batch: 8, optimizer: {lr: 1e-3}}\n  judge:\n",
            "stages.tuned.data.label: these pictures have no labels, which latent reads",
        ),
        ("suites: [images]", "suites: [images, perplexity]", "it stands alone"),
        ("    features: judge\n", "", "needs `features` (a classifier) and `images`"),
        (
            "images: {source: digits,",
            "images: {source: digits, limit: 3,",
            "exam.images.limit: distances need 2",
        ),
        ("metric: gan.coverage", "metric: gan.win_rate", "has no such metric"),
        ("depth: 2, latent: 4}", "depth: 5, latent: 4}", "5 levels halve the size 4 times, but the pictures are 8x8"),
        (
            "depth: 2, latent: 4}",
            "depth: 4, latent: 4}",
            "2 levels halve the size 1 times, but the latents of vae are 1x1",
        ),
        (
            "    autoencoder: vae\n    architecture: {family: ddpm, ",
            "    architecture: {family: ddpm, block_out_channels: [8, 8, 8, 8, 8], ",
            "stages.latent.architecture.block_out_channels: 5 levels halve the size 4 times",
        ),
        ("latent: 4}", "latent: 4, kl_warmup_steps: 99}", "the KL weight would never reach kl_weight"),
        ("latent: 4}", "latent: 4, likelihood: gaussian, binarize: true}", "needs likelihood: bernoulli"),
    ],
)
def test_what_does_not_fit_is_said(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    assert said in problems_of(TEXT, (old, new))
