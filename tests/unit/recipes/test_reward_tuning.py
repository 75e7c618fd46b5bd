"""Recipes of reward-tuned diffusion: what fits together, what is said where it does not, and what is predicted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.data.image_facts import PictureFacts
from recipes.loading.load import load_recipe
from recipes.planning.derive import samples_divide, stage_batch, stage_steps
from recipes.planning.fingerprint import ParentId, fingerprint, meaning_of
from recipes.planning.plan import build_plan, fit_workers
from recipes.planning.settle import Hardware, settle_shards
from recipes.planning.smoke import shrink
from recipes.recipe import Recipe
from recipes.references import stage_inputs, stage_parts, stage_sources
from recipes.stages.kinds import PpoImages, PpoStage

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
    kind: ppo
    actor: ddpm
    reward: {classifier: judge}
    rollout: {pictures_per_iteration: 40, classes: ["3", "7"]}
    ppo: {estimator: ddpo, iterations: 5, mini_batches: 4, optimizer: {lr: 1e-4}}
  again:
    kind: ppo
    actor: policy
    reward: {rule: symmetry}
    rollout: {pictures_per_iteration: 40}
    ppo: {estimator: ddpo, iterations: 5, optimizer: {lr: 1e-4}}
  exam:
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
    assert isinstance(policy, PpoImages)
    assert [(item.field_path, item.text, item.wants) for item in stage_inputs(policy)] == [
        ("actor", "ddpm", ("ddpm",)),
        ("reward.classifier", "judge", ("classifier",)),
    ]
    assert [item.field_path for item in stage_inputs(stages["again"])] == ["actor"]
    assert stage_parts(policy) == {"model": "ddpm"}
    assert stage_batch(policy) == 10
    assert stage_steps(policy) == 20
    assert [samples_divide(policy, workers) for workers in (1, 3, 5)] == [True, False, True]


def test_an_estimator_says_what_kind_of_stage_it_is() -> None:
    shipped = Path(__file__).parents[3] / "recipes"
    assert isinstance(load_recipe(shipped / "quickstart.yaml").recipe.stages["policy"], PpoStage)
    assert isinstance(load_recipe(shipped / "image" / "ddpo.yaml").recipe.stages["policy"], PpoImages)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{classifier: judge}", "{classifier: ddpm}", "needs an image classifier, but ddpm (pretrain) is a diffusion"),
        ("{classifier: judge}", "judge", "a reward of pictures is a mapping with `classifier: ...`"),
        (
            "{classifier: judge}",
            "{rule: beauty}",
            "stages.policy.reward.rule: must be ink, symmetry or compressibility",
        ),
        ("{classifier: judge}", "{classifier: judge, lable: 3}", "did you mean label?"),
        ("{classifier: judge}", "{classifier: judge, rule: ink}", "unknown key (found 'ink'); give classifier or rule"),
        ("{classifier: judge}", "{rule: ink, label: '3'}", "reward.label: unknown key (found '3'); belongs to classif"),
        (
            "estimator: ddpo, iterations",
            "iterations",
            "pictures_per_iteration: unknown key (found 40); belongs to ppo.",
        ),
        (
            "mini_batches: 4",
            "mini_batches: 4, critic_lr: 1e-3",
            "unknown key (found 0.001); belongs to ppo.estimator: g",
        ),
        ("actor: ddpm", "actor: judge", "needs a diffusion model, but judge (pretrain) is an image classifier"),
        ("estimator: ddpo, iterations: 5, mini", "estimator: dppo, mini", "must be gae or ddpo (found 'dppo')"),
        ("estimator: ddpo, iterations: 5, mini", "estimator: ddpo, mini", "stages.policy.ppo.iterations: the key is"),
        ("mini_batches: 4", "mini_batches: 3", "pictures_per_iteration (40) must divide into mini_batches (3)"),
        ("mini_batches: 4", "mini_batches: 4, gamma: 0.9", "stages.policy.ppo.gamma: unknown key"),
        (
            "pictures_per_iteration: 40, classes",
            "pictures_per_iteration: 81, classes",
            "cannot be divided among 2 workers (found 81); for example 80 or 88",
        ),
        ("mini_batches: 4", "mini_batches: 16", "into mini_batches (16) (found 16); for example 20"),
        ("{workers: 2}", "{workers: 3}", "the pictures of an iteration cannot be divided among 3 workers"),
        ("mini_batches: 4", "mini_batches: 8", "stages.policy.rollout.pictures_per_iteration: the batch (5) cannot"),
        ("classes: [", "steps: 200, classes: [", "the actor's noising process has 100 steps (found 200)"),
        ("sampling_steps: 8", "sampling_steps: 1", "the last denoising step is no action"),
        ("class_conditional: true, ", "", "the actor is not class-conditional: no class can be asked for"),
        ("class_conditional: true, ", "", "the actor is not class-conditional: say which class is rewarded"),
        ('classes: ["3"', 'guidance: 2.0, classes: ["7"', "a class stands more than once"),
        ("timesteps: 100", "label_dropout: 0, timesteps: 100", ""),
        (
            "pictures_per_iteration: 40, classes",
            "pictures_per_iteration: 2, classes",
            "too few of each for a deviation",
        ),
        ("lr: 1e-4}}\n  again", "lr: 1e-4}, schedule: {warmup_steps: 20}}\n  again", "warmup_steps must be below"),
        (
            "mini_batches: 4",
            "mini_batches: 4, kl_controller: {name: adaptive, target: 1}",
            "which is 0 and would stay 0",
        ),
    ],
)
def test_what_does_not_fit_is_said(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    found = problems_of(TEXT, (old, new))
    assert said in found
    assert bool(said) == bool(found)


def test_guidance_needs_an_actor_that_can_do_without_a_label(problems_of: Callable[..., str]) -> None:
    edits = (("timesteps: 100", "label_dropout: 0, timesteps: 100"), ("classes: [", "guidance: 2.0, classes: ["))
    assert "stages.policy.rollout.guidance: the actor was never trained without its label" in problems_of(TEXT, *edits)


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
    kind: ppo
    actor: ddpm
    reward: {classifier: judge}
    prompts: {source: digits}
    lora: {r: 4, target_modules: [to_q, to_k]}
    rollout: {pictures_per_iteration: 40, samples_per_prompt: 4}
    ppo: {estimator: ddpo, iterations: 5, mini_batches: 4, optimizer: {lr: 1e-4}}
"""
)


def test_captions_of_a_source_are_asked_for_and_adapters_are_a_part(recipe_of: Callable[..., Recipe]) -> None:
    policy = recipe_of(CAPTIONED).stages["policy"]
    assert [(use.field_path, use.role, use.held_out) for use in stage_sources(policy)] == [("prompts", "images", False)]
    assert stage_parts(policy) == {"model": "ddpm", "adapter": "adapter"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    prompts: {source: digits}\n", "", "stages.policy.prompts: the actor draws from captions: say whose"),
        (
            "prompts: {source: digits}",
            "prompts: {source: idx, files: [a], label_files: [b]}",
            "prompts.source: these pictures have no captions, which ddpm reads (found 'idx')",
        ),
        (
            "prompts: {source: digits}",
            "prompts: {source: arrays, files: [a.npy], caption_files: [a.csv]}",
            "prompts.labels: these pictures have no labels, and the reward asks for the class of a caption's picture; "
            "set labels, or reward.label",
        ),
        ("prompts: {source: digits}", "prompts: {source: csv, files: [a.csv]}", "must be digits, idx, image-folder"),
        ("samples_per_prompt: 4", "samples_per_prompt: 3", "samples_per_prompt (3) must divide pictures_per_iteration"),
        ("samples_per_prompt: 4", "samples_per_prompt: 1", "one picture of a caption has no deviation"),
        ("samples_per_prompt: 4", "samples_per_prompt: 4, classes: ['3']", "draws from captions: no class can be"),
        ("guidance: 1.5", "label_dropout: 0", ""),
        ("[to_q, to_k]", "[to_q, to_y]", "lora.target_modules.1: adapters go on the linear modules"),
    ],
)
def test_what_does_not_fit_captions_is_said(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    found = problems_of(CAPTIONED, (old, new))
    assert said in found
    assert bool(said) == bool(found)


def test_captions_are_no_matter_for_an_actor_that_reads_none(problems_of: Callable[..., str]) -> None:
    found = problems_of(CAPTIONED, ("text_encoder: words", "seed: 1"), (", guidance: 1.5", ", class_conditional: true"))
    assert "stages.policy.prompts: the actor draws from no captions; remove the key" in found
    assert "stages.policy.rollout.samples_per_prompt: the actor draws from no captions (found 4); remove" in found


def test_captioned_guidance_needs_an_actor_that_can_do_without(problems_of: Callable[..., str]) -> None:
    edits = (("guidance: 1.5", "label_dropout: 0"), ("samples_per_prompt: 4", "samples_per_prompt: 4, guidance: 2"))
    assert "guidance: the actor was never trained without its caption" in problems_of(CAPTIONED, *edits)


def test_adapters_and_captions_are_predicted_and_made_small(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(CAPTIONED)
    small = shrink(recipe).stages["policy"]
    assert isinstance(small, PpoImages)
    assert (small.rollout.pictures_per_iteration, small.rollout.samples_per_prompt) == (16, 2)
    assert small.prompts is not None
    assert small.prompts.limit == 400
    assert shrink(shrink(recipe)) == shrink(recipe)
    facts = dict.fromkeys(recipe.stages, PictureFacts(1, 8, 8))
    planned = {stage.name: stage for stage in build_plan(recipe, workers=2, data={}, pictures=facts).stages}
    start, tuned = planned["ddpm"].sizes, planned["policy"].sizes
    assert start is not None
    assert tuned is not None
    assert tuned.trainable_parameters < start.trainable_parameters / 2
    assert tuned.parameters == start.parameters + tuned.trainable_parameters  # the start is the same network


def test_fields_that_joined_leave_earlier_fingerprints_alone(recipe_of: Callable[..., Recipe]) -> None:
    """A class-conditional stage as it was before captions and adapters; its meaning is written out."""
    stage = recipe_of(TEXT).stages["policy"]
    meaning = meaning_of(stage)
    assert not {"lora", "prompts"} & set(meaning)
    assert "samples_per_prompt" not in meaning["rollout"]
    captioned = meaning_of(recipe_of(CAPTIONED).stages["policy"])
    assert captioned["rollout"]["samples_per_prompt"] == 4
    assert captioned["lora"]["r"] == 4
    assert captioned["prompts"]["source"] == "digits"
    parents = {item.field_path: ParentId(item.text, "digest") for item in stage_inputs(stage)}
    known = "b5533c66c0c6627c60097bf68ac186f9da24031daf4b13b7d7d1e244f2503540"
    settled = settle_shards(recipe_of(TEXT), Hardware(), 1, lambda _: {}).recipe
    assert fingerprint("policy", settled, parents, {}) == known


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "{classifier: judge}",
            "{classifier: judge, label: seven}",
            "reward.label: no such class (found 'seven'); one",
        ),
        ('classes: ["3"', 'classes: ["33"', "rollout.classes.0: no such class (found '33'); did you mean 3?"),
        ('40, classes: ["3", "7"]', "10", "draws none of the 10 classes twice"),
    ],
)
def test_classes_of_the_digits_are_known(problems_of: Callable[..., str], old: str, new: str, said: str) -> None:
    assert said in problems_of(TEXT, (old, new))


def test_activations_are_kept(problems_of: Callable[..., str]) -> None:
    edit = ("    actor: ddpm\n", "    actor: ddpm\n    shard: {gradient_checkpointing: true}\n")
    assert "stages.policy.shard.gradient_checkpointing: models of pictures keep" in problems_of(TEXT, edit)


def test_the_smoke_form_and_the_prediction(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(TEXT)
    small = shrink(recipe).stages["policy"]
    assert isinstance(small, PpoImages)
    assert (small.ppo.iterations, small.rollout.pictures_per_iteration, small.rollout.steps) == (2, 16, 5)
    assert shrink(shrink(recipe)) == shrink(recipe)
    assert (
        fit_workers(recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"workers": "auto"})}), 4)
        == 2
    )
    facts = dict.fromkeys(recipe.stages, PictureFacts(1, 8, 8))
    planned = {stage.name: stage for stage in build_plan(recipe, workers=2, data={}, pictures=facts).stages}
    start, tuned = planned["ddpm"].sizes, planned["again"].sizes
    assert start is not None
    assert tuned is not None
    assert tuned.trainable_parameters == start.trainable_parameters
    assert tuned.parameters == 2 * start.parameters  # the frozen start
    assert planned["again"].fingerprint != planned["policy"].fingerprint
    guided = recipe.stages["policy"].model_copy(
        update={"rollout": recipe.stages["policy"].rollout.model_copy(update={"guidance": 2.0})}  # type: ignore[union-attr]
    )
    other = recipe.model_copy(update={"stages": {**recipe.stages, "policy": guided}})
    (more,) = [s.sizes for s in build_plan(other, workers=2, data={}, pictures=facts).stages if s.name == "policy"]
    assert more is not None
    assert planned["policy"].sizes is not None
    assert more.memory_per_worker_bytes > planned["policy"].sizes.memory_per_worker_bytes
