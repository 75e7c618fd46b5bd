"""A small recipe with every kind of stage, written to a folder, and edited by text."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from launch.inputs.data_check import load_checked
from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import find_system, recognise
from recipes.convert.source_text import read_source
from recipes.errors import RecipeError
from recipes.recipe import Recipe
from tests.unit.recipes.conversions import DATASET_INFO, Convert

CHAIN = """\
name: chain
seed: 3
cluster: {workers: 2, min_workers: 1}
stages:
  base:
    kind: pretrain
    architecture:
      family: decoder
      type: llama
      num_hidden_layers: 2
      hidden_size: 64
      intermediate_size: 128
      num_attention_heads: 4
      num_key_value_heads: 2
      max_position_embeddings: 128
    tokenizer:
      train: bpe
      vocab_size: 512
    data: {source: python-docs}
    train:
      tokens: 100_000
      global_batch: 8
      sequence_length: 64
      optimizer: {lr: 1e-3}
      schedule: {name: cosine, warmup_steps: 5}
    shard: {zero: 2, precision: fp32, micro_batch: auto}
  chat:
    kind: finetune
    init_from: base
    lora: {r: 8, target_modules: [q_proj, v_proj]}
    data: {source: jsonl, files: [rows/chat.jsonl], hold_out: 0.1}
    train:
      steps: 20
      global_batch: 8
      sequence_length: 64
      optimizer: {lr: 1e-3}
  judge:
    kind: reward
    init_from: chat
    data: {source: csv, files: [rows/pairs.csv], hold_out: 0.1}
    train:
      steps: 20
      global_batch: 8
      sequence_length: 64
      optimizer: {lr: 1e-3}
  policy:
    kind: rl
    actor: chat
    rewards: {judge: {model: judge}}
    prompts: {source: python-docs, part: 1/2}
    rollout: {prompts_per_iteration: 8, max_prompt_tokens: 64, max_new_tokens: 32}
    algorithm:
      name: ppo
      iterations: 4
      mini_batches: 2
      kl_coef: 0.05
      optimizer: {lr: 1e-4}
  eval:
    kind: evaluate
    of: [chat, policy]
    rewards: {judge: {model: judge}}
    suites: [perplexity, generation, comparison]
    num_prompts: 16
    sequence_length: 64
    sampling: {max_prompt_tokens: 64, max_new_tokens: 32}
"""

WriteRecipe = Callable[..., Path]


@pytest.fixture
def write_recipe(tmp_path: Path) -> WriteRecipe:
    """Write the chain with replacements of its text; each one must change it."""
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    (rows / "pairs.csv").write_text("prompt,chosen,rejected\n" + "a,b,c\n" * 20)
    (rows / "text.txt").write_text("Some text.\n")

    def write(*edits: tuple[str, str], name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(edited(CHAIN, edits))
        return path

    return write


def edited(text: str, edits: Iterable[tuple[str, str]]) -> str:
    """The text with the first occurrence of each old part replaced; each one must be there."""
    for old, new in edits:
        assert old in text, f"{old!r} is not in the recipe"
        text = text.replace(old, new, 1)
    return text


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    """Load a recipe's text after edits, from recipe.yaml; raises RecipeError where it is wrong."""

    def load(text: str, *edits: tuple[str, str], smoke: bool = False) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(edited(text, edits))
        return load_checked(path, smoke=smoke).recipe

    return load


ProblemsOf = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def problems_of(recipe_of: Callable[..., Recipe]) -> ProblemsOf:
    """Load a recipe's text after edits; returns the code and the field of everything that is wrong."""

    def load(text: str, *edits: tuple[str, str]) -> list[tuple[str, str]]:
        try:
            recipe_of(text, *edits)
        except RecipeError as error:
            return [(str(problem.code), problem.field) for problem in error.problems]
        return []

    return load


@pytest.fixture
def converted(tmp_path: Path) -> Convert:
    """Write a file and convert it to a recipe in the same folder."""

    def make(text: str, name: str = "config.yaml", system: str | None = None, **options: Any) -> Conversion:
        path = tmp_path / name
        path.write_text(text)
        source = read_source(path, tmp_path)
        known = recognise(source.value, name)[0] if system is None else find_system(system)
        return convert([(source, known)], tmp_path, **options)

    return make


@pytest.fixture
def factory_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
