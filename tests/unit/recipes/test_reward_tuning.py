"""Recipes of reward-tuned diffusion: what fits together, what is refused, and what is predicted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.data.images import ImageSetFacts
from recipes.loading.load import load_recipe
from recipes.planning.fingerprint import meaning_of
from recipes.planning.plan import build_plan, fit_workers
from recipes.planning.smoke import shrink
from recipes.recipe import Recipe
from recipes.stages.rl import RlText
from recipes.stages.rl_images import RlImages

ProblemsOf = Callable[..., list[tuple[str, str]]]

JUDGE = """\
  judge:
    kind: pretrain
    architecture: {family: classifier}
    data: {source: digits}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
"""
TEXT = (
    """\
name: tuned
cluster: {workers: 2}
stages:
  ddpm:
    kind: pretrain
    architecture: {family: ddpm, block_out_channels: [8], class_conditional: true, timesteps: 100, sampling_steps: 8}
    data: {source: digits}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
"""
    + JUDGE
    + """\
  policy:
    kind: rl
    actor: ddpm
    reward: {classifier: judge}
    rollout: {images_per_iteration: 40, classes: ["3", "7"]}
    algorithm: {name: ddpo, iterations: 5, mini_batches: 4, optimizer: {lr: 1e-4}}
  again:
    kind: rl
    actor: policy
    reward: {rule: symmetry}
    rollout: {images_per_iteration: 40}
    algorithm: {name: ddpo, iterations: 5, optimizer: {lr: 1e-4}}
  eval:
    kind: evaluate
    of: [ddpm, again]
    suites: [images]
    features: judge
    images: {source: digits, hold_out: 0.2}
"""
)


def test_the_recipe_is_right_and_names_its_inputs(recipe_of: Callable[..., Recipe]) -> None:
    stages = recipe_of(TEXT).stages
    policy = stages["policy"]
    assert isinstance(policy, RlImages)
    assert [(item.field_path, item.text, item.wants) for item in policy.inputs()] == [
        ("actor", "ddpm", ("ddpm",)),
        ("reward.classifier", "judge", ("classifier",)),
    ]
    assert [item.field_path for item in stages["again"].inputs()] == ["actor"]
    assert policy.outputs() == {"model": "ddpm"}
    assert policy.batch().size == 10
    assert policy.steps() == 20
    assert [policy.batch().divides(workers) for workers in (1, 3, 5)] == [True, False, True]


def test_an_algorithm_says_what_kind_of_stage_it_is() -> None:
    shipped = Path(__file__).parents[3] / "recipes"
    assert isinstance(load_recipe(shipped / "quickstart.yaml").recipe.stages["policy"], RlText)
    assert isinstance(load_recipe(shipped / "image" / "ddpo.yaml").recipe.stages["policy"], RlImages)


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        ("{classifier: judge}", "{classifier: ddpm}", "wrong-artifact-kind", "stages.policy.reward.classifier"),
        ("{classifier: judge}", "judge", "wrong-type", "stages.policy.reward"),
        (
            "{classifier: judge}",
            "{rule: beauty}",
            "unknown-choice",
            "stages.policy.reward.rule",
        ),
        ("{classifier: judge}", "{classifier: judge, lable: 3}", "unknown-key", "stages.policy.reward.lable"),
        ("{classifier: judge}", "{classifier: judge, rule: ink}", "unknown-key", "stages.policy.reward.rule"),
        ("{classifier: judge}", "{rule: ink, label: '3'}", "unknown-key", "stages.policy.reward.label"),
        (
            "name: ddpo, iterations",
            "iterations",
            "missing-key",
            "stages.policy.algorithm.name",
        ),
        (
            "mini_batches: 4",
            "mini_batches: 4, critic: {lr: 1e-3}",
            "unknown-key",
            "stages.policy.algorithm.critic",
        ),
        ("actor: ddpm", "actor: judge", "wrong-artifact-kind", "stages.policy.actor"),
        (
            "name: ddpo, iterations: 5, mini",
            "name: dppo, mini",
            "unknown-choice",
            "stages.policy.algorithm.name",
        ),
        (
            "name: ddpo, iterations: 5, mini",
            "name: ddpo, mini",
            "missing-key",
            "stages.policy.algorithm.iterations",
        ),
        ("mini_batches: 4", "mini_batches: 3", "batch-not-divisible", "stages.policy.algorithm.mini_batches"),
        ("mini_batches: 4", "mini_batches: 4, gamma: 0.9", "unknown-key", "stages.policy.algorithm.gamma"),
        (
            "images_per_iteration: 40, classes",
            "images_per_iteration: 81, classes",
            "batch-not-divisible",
            "stages.policy.rollout.images_per_iteration",
        ),
        ("mini_batches: 4", "mini_batches: 16", "batch-not-divisible", "stages.policy.algorithm.mini_batches"),
        ("{workers: 2}", "{workers: 3}", "batch-not-divisible", "stages.policy.rollout.images_per_iteration"),
        ("mini_batches: 4", "mini_batches: 8", "batch-not-divisible", "stages.policy.rollout.images_per_iteration"),
        ("classes: [", "steps: 200, classes: [", "too-many-steps", "stages.policy.rollout.steps"),
        ("sampling_steps: 8", "sampling_steps: 1", "too-few-steps", "stages.policy.rollout.steps"),
        ("class_conditional: true, ", "", "not-applicable", "stages.policy.rollout.classes"),
        ("class_conditional: true, ", "", "missing-key", "stages.policy.reward.label"),
        ('classes: ["3"', 'guidance: 2.0, classes: ["7"', "duplicate-item", "stages.policy.rollout.classes"),
        ("timesteps: 100", "label_dropout: 0, timesteps: 100", "", ""),
        (
            "images_per_iteration: 40, classes",
            "images_per_iteration: 2, classes",
            "too-few-samples",
            "stages.policy.rollout.images_per_iteration",
        ),
        (
            "lr: 1e-4}}\n  again",
            "lr: 1e-4}, schedule: {warmup_steps: 20}}\n  again",
            "warmup-too-long",
            "stages.policy.algorithm.schedule.warmup_steps",
        ),
        (
            "mini_batches: 4",
            "mini_batches: 4, kl_controller: {name: adaptive, target: 1}",
            "unmet-requirement",
            "stages.policy.algorithm.kl_coef",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    found = problems_of(TEXT, (old, new))
    assert (code, field) in found if code else found == []


def test_guidance_needs_an_actor_that_can_do_without_a_label(problems_of: ProblemsOf) -> None:
    edits = (("timesteps: 100", "label_dropout: 0, timesteps: 100"), ("classes: [", "guidance: 2.0, classes: ["))
    assert ("unmet-requirement", "stages.policy.rollout.guidance") in problems_of(TEXT, *edits)


CAPTIONED = (
    """\
name: captioned
cluster: {workers: 2}
stages:
  words:
    kind: pretrain
    architecture: {family: decoder, type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}
    tokenizer: {train: bpe, vocab_size: 512}
    data: {source: python-docs, split: train}
    train: {steps: 20, global_batch: 8, sequence_length: 32, optimizer: {lr: 1e-3}}
  ddpm:
    kind: pretrain
    text_encoder: words
    architecture: {family: ddpm, block_out_channels: [8], timesteps: 100, sampling_steps: 8, guidance: 1.5}
    data: {source: digits}
    train: {steps: 20, global_batch: 8, optimizer: {lr: 1e-3}}
"""
    + JUDGE
    + """\
  policy:
    kind: rl
    actor: ddpm
    reward: {classifier: judge}
    prompts: {source: digits}
    lora: {r: 4, target_modules: [to_q, to_k]}
    rollout: {images_per_iteration: 40, samples_per_prompt: 4}
    algorithm: {name: ddpo, iterations: 5, mini_batches: 4, optimizer: {lr: 1e-4}}
"""
)


def test_captions_of_a_source_are_asked_for_and_adapters_are_a_part(recipe_of: Callable[..., Recipe]) -> None:
    policy = recipe_of(CAPTIONED).stages["policy"]
    assert [(use.field_path, use.role, use.held_out) for use in policy.sources()] == [("prompts", "images", False)]
    assert policy.outputs() == {"model": "ddpm", "adapter": "adapter"}


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        ("    prompts: {source: digits}\n", "", "missing-key", "stages.policy.prompts"),
        (
            "prompts: {source: digits}",
            "prompts: {source: idx, files: [a], label_files: [b]}",
            "missing-captions",
            "stages.policy.prompts.source",
        ),
        (
            "prompts: {source: digits}",
            "prompts: {source: arrays, files: [a.npy], caption_files: [a.csv]}",
            "missing-labels",
            "stages.policy.prompts.labels",
        ),
        (
            "prompts: {source: digits}",
            "prompts: {source: csv, files: [a.csv]}",
            "unknown-choice",
            "stages.policy.prompts.source",
        ),
        ("samples_per_prompt: 4", "samples_per_prompt: 3", "not-divisible", "stages.policy.rollout"),
        (
            "samples_per_prompt: 4",
            "samples_per_prompt: 1",
            "too-few-samples",
            "stages.policy.rollout.samples_per_prompt",
        ),
        (
            "samples_per_prompt: 4",
            "samples_per_prompt: 4, classes: ['3']",
            "not-applicable",
            "stages.policy.rollout.classes",
        ),
        ("guidance: 1.5", "label_dropout: 0", "", ""),
        ("[to_q, to_k]", "[to_q, to_y]", "unknown-module", "stages.policy.lora.target_modules.1"),
    ],
)
def test_what_does_not_fit_captions_is_said(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    found = problems_of(CAPTIONED, (old, new))
    assert (code, field) in found if code else found == []


def test_captions_are_no_matter_for_an_actor_that_reads_none(problems_of: ProblemsOf) -> None:
    found = problems_of(CAPTIONED, ("text_encoder: words", "seed: 1"), (", guidance: 1.5", ", class_conditional: true"))
    assert ("not-applicable", "stages.policy.prompts") in found
    assert ("not-applicable", "stages.policy.rollout.samples_per_prompt") in found


def test_captioned_guidance_needs_an_actor_that_can_do_without(problems_of: ProblemsOf) -> None:
    edits = (("guidance: 1.5", "label_dropout: 0"), ("samples_per_prompt: 4", "samples_per_prompt: 4, guidance: 2"))
    assert ("unmet-requirement", "stages.policy.rollout.guidance") in problems_of(CAPTIONED, *edits)


def test_adapters_and_captions_are_predicted_and_made_small(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(CAPTIONED)
    small = shrink(recipe).stages["policy"]
    assert isinstance(small, RlImages)
    assert (small.rollout.images_per_iteration, small.rollout.samples_per_prompt) == (16, 2)
    assert small.prompts is not None
    assert small.prompts.limit == 400
    assert shrink(shrink(recipe)) == shrink(recipe)
    facts = dict.fromkeys(recipe.stages, ImageSetFacts(1, 8, 8))
    planned = {stage.name: stage for stage in build_plan(recipe, workers=2, data={}, images=facts).stages}
    start, tuned = planned["ddpm"].sizes, planned["policy"].sizes
    assert start is not None
    assert tuned is not None
    assert tuned.trainable_parameters < start.trainable_parameters / 2
    assert tuned.parameters == start.parameters
    assert (
        tuned.memory.weights == start.memory.weights + 4 * tuned.trainable_parameters
    )  # the start is the same network


def test_fields_that_joined_leave_earlier_fingerprints_alone(recipe_of: Callable[..., Recipe]) -> None:
    """At their defaults they are no part of a class-conditional stage's meaning; tests/golden holds its fingerprint."""
    stage = recipe_of(TEXT).stages["policy"]
    meaning = meaning_of(stage)
    assert not {"lora", "prompts"} & set(meaning)
    assert "samples_per_prompt" not in meaning["rollout"]
    captioned = meaning_of(recipe_of(CAPTIONED).stages["policy"])
    assert captioned["rollout"]["samples_per_prompt"] == 4
    assert captioned["lora"]["r"] == 4
    assert captioned["prompts"]["source"] == "digits"


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        (
            "{classifier: judge}",
            "{classifier: judge, label: seven}",
            "unknown-class",
            "stages.policy.reward.label",
        ),
        ('classes: ["3"', 'classes: ["33"', "unknown-class", "stages.policy.rollout.classes.0"),
        ('40, classes: ["3", "7"]', "10", "too-few-samples", "stages.policy.rollout.images_per_iteration"),
    ],
)
def test_classes_of_the_digits_are_known(problems_of: ProblemsOf, old: str, new: str, code: str, field: str) -> None:
    assert (code, field) in problems_of(TEXT, (old, new))


def test_activations_are_kept(problems_of: ProblemsOf) -> None:
    edit = ("    actor: ddpm\n", "    actor: ddpm\n    shard: {gradient_checkpointing: true}\n")
    assert ("not-applicable", "stages.policy.shard.gradient_checkpointing") in problems_of(TEXT, edit)


def test_the_smoke_form_and_the_prediction(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(TEXT)
    small = shrink(recipe).stages["policy"]
    assert isinstance(small, RlImages)
    assert (small.algorithm.iterations, small.rollout.images_per_iteration, small.rollout.steps) == (2, 16, 5)
    assert shrink(shrink(recipe)) == shrink(recipe)
    assert (
        fit_workers(recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"workers": "auto"})}), 4)
        == 2
    )
    facts = dict.fromkeys(recipe.stages, ImageSetFacts(1, 8, 8))
    planned = {stage.name: stage for stage in build_plan(recipe, workers=2, data={}, images=facts).stages}
    start, tuned = planned["ddpm"].sizes, planned["again"].sizes
    assert start is not None
    assert tuned is not None
    assert tuned.trainable_parameters == start.trainable_parameters
    assert tuned.parameters == start.parameters
    assert tuned.memory.weights == 2 * start.memory.weights  # the frozen start
    assert planned["again"].fingerprint != planned["policy"].fingerprint
    guided = recipe.stages["policy"].model_copy(
        update={"rollout": recipe.stages["policy"].rollout.model_copy(update={"guidance": 2.0})}  # type: ignore[union-attr]
    )
    other = recipe.model_copy(update={"stages": {**recipe.stages, "policy": guided}})
    (more,) = [s.sizes for s in build_plan(other, workers=2, data={}, images=facts).stages if s.name == "policy"]
    assert more is not None
    assert planned["policy"].sizes is not None
    assert more.memory_per_worker_bytes > planned["policy"].sizes.memory_per_worker_bytes
