"""Architectures of any type of transformers: keys by the generated table, and what a type cannot do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.loading.load import dump_recipe, load_recipe, parse_recipe
from recipes.planning.fingerprint import meaning_of
from recipes.planning.smoke import shrink

ProblemsOf = Callable[..., list[tuple[str, str]]]

RECIPE = """\
name: any
stages:
  base:
    kind: pretrain
    architecture: {{family: decoder, type: {architecture}}}
    tokenizer: {{train: bpe, vocab_size: 400}}
    data: {{source: python-docs}}
    train: {{steps: 20, global_batch: 8, sequence_length: 64, optimizer: {{lr: 1e-3}}{train}}}
{rest}"""
MISTRAL = (
    "mistral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8"
)


def recipe(architecture: str, train: str = "", rest: str = "") -> str:
    return RECIPE.format(architecture=architecture, train=train, rest=rest)


def test_a_type_without_a_class_of_its_own_is_right(problems_of: ProblemsOf) -> None:
    assert problems_of(recipe(MISTRAL)) == []


@pytest.mark.parametrize(
    ("architecture", "field", "code"),
    [
        (f"{MISTRAL}, slidng_window: 8", "stages.base.architecture.slidng_window", "unknown-key"),
        (f"{MISTRAL}, hidden_act: 3", "stages.base.architecture.hidden_act", "wrong-type"),
        (f"{MISTRAL}, attention_dropout: none", "stages.base.architecture.attention_dropout", "wrong-type"),
        ("mistral, hidden_size: 0", "stages.base.architecture.hidden_size", "out-of-range"),
        ("qwen2, num_attention_heads: 6", "stages.base.architecture.num_attention_heads", "not-divisible"),
        (f"mistrall{MISTRAL[7:]}", "stages.base.architecture.type", "unknown-choice"),
    ],
)
def test_what_is_wrong_is_found_at_its_key(problems_of: ProblemsOf, architecture: str, field: str, code: str) -> None:
    assert (code, field) in problems_of(recipe(architecture))


def test_the_nearest_key_is_named(tmp_path: Path) -> None:
    from recipes.errors import RecipeError

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(f"{MISTRAL}, slidng_window: 8"))
    with pytest.raises(RecipeError, match=r"slidng_window: .* sliding_window"):
        load_recipe(path)


MAMBA = "mamba, hidden_size: 32, num_hidden_layers: 2, state_size: 4"
SCORED = """\
  reward:
    kind: reward
    init_from: base
    data: {source: python-docs}
    train: {steps: 20, global_batch: 8, sequence_length: 64, optimizer: {lr: 1e-3}}
"""


def test_what_a_type_cannot_do_is_refused_with_the_reason(problems_of: ProblemsOf) -> None:
    assert problems_of(recipe(MAMBA)) == [("unsupported-model", "stages.base.train.packing")]
    assert problems_of(recipe(MAMBA, train=", packing: false")) == []
    found = problems_of(recipe(MAMBA, train=", packing: false", rest=SCORED))
    assert found == [("unsupported-model", "stages.reward.init_from")]


ENCODER = (
    "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: {}"
)


def encoder(architecture: str, train: str = "") -> str:
    text = recipe(architecture, train).replace("family: decoder", "family: encoder")
    return text.replace("vocab_size: 400", 'vocab_size: 400, cls_token: "<|cls|>", mask_token: "<|mask|>"')


def test_an_encoder_whose_rows_cannot_be_packed_is_refused_until_they_are_not(problems_of: ProblemsOf) -> None:
    deberta = f"deberta-v2, {ENCODER.format(64)}"
    assert problems_of(encoder(deberta)) == [("unsupported-model", "stages.base.train.packing")]
    assert problems_of(encoder(deberta, train=", packing: false")) == []


def test_positions_that_start_behind_the_pad_token_leave_less_room(problems_of: ProblemsOf) -> None:
    assert problems_of(encoder(f"roberta, {ENCODER.format(66)}")) == []
    found = problems_of(encoder(f"roberta, {ENCODER.format(64)}"))
    assert found == [("sequence-too-long", "stages.base.train.sequence_length")]


def test_keys_survive_a_dump_and_count_as_meaning(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(f"{MISTRAL}, sliding_window: 16"))
    loaded = load_recipe(path).recipe
    again = parse_recipe(dump_recipe(loaded))
    assert again == loaded
    meaning = meaning_of(again.stages["base"])["architecture"]
    assert meaning["sliding_window"] == 16
    small = shrink(loaded).stages["base"].architecture.config_keys()
    assert small["num_hidden_layers"] == 2
    assert small["hidden_size"] % small["num_attention_heads"] == 0
