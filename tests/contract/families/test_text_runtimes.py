"""What recipes and trainers say of a family of language models agrees."""

import pytest
import torch

from recipes.errors import StageError
from recipes.models.architecture import MODEL_TYPES, TEXT_FAMILIES, TYPES
from recipes.models.type_table import type_records
from trainers.models.families import runtime_of
from trainers.models.load import stock_class

MADE_OF = {
    "model": ("language_model", "masked_model", "seq2seq_model", "vision_language_model"),
    "reward_model": ("score_model",),
    "critic": ("value_model",),
    "text_classifier": ("text_classifier",),
}
"""What a recipe calls a model -> its kinds in a worker."""


@pytest.mark.parametrize("model_type", sorted(set(TYPES) - set(type_records())))
def test_the_classes_that_open_a_type_are_those_that_recipes_take_in(model_type: str) -> None:
    family = MODEL_TYPES[model_type]
    for kind in runtime_of(family.name).kinds:
        assert kind in MADE_OF[family.types[model_type].classes[stock_class(model_type, kind).__name__]]


def test_the_table_s_classes_are_those_that_recipes_take_in() -> None:
    for model_type, record in type_records().items():
        known = MODEL_TYPES[model_type].types[model_type].classes
        for kind in runtime_of(record.family).kinds:
            assert kind not in record.classes or kind in MADE_OF[known[record.classes[kind]]]
    assert stock_class("mistral", "score_model").__name__ == "MistralForSequenceClassification"


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_attention_suits_every_device(family: str) -> None:
    for name in ("cpu", "cuda"):
        found = runtime_of(family).attention(torch.device(name), next(iter(TEXT_FAMILIES[family].types)))
        assert set(found.values() if isinstance(found, dict) else [found]) <= {"sdpa", "eager", "block_causal"}


def test_a_kind_that_a_type_does_not_make_names_those_that_do() -> None:
    with pytest.raises(StageError) as caught:
        stock_class("bert", "seq2seq_model")
    assert all(name in str(caught.value) for name in ("bert", "t5", "bart"))


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(ValueError, match="mamba"):
        runtime_of("mamba")
