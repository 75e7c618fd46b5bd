"""Every field of the schema is declared whole, and the generated reference is up to date."""

import typing
from collections.abc import Iterator
from pathlib import Path

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recipes.loading.schema_paths import describe_field
from recipes.models.families import FAMILIES
from recipes.planning.fingerprint import field_role
from recipes.recipe import Recipe
from recipes.reference import json_schema, markdown_reference
from recipes.stages.kinds import SEMANTICS, PretrainFamily, Stage

ROOT = Path(__file__).parents[3]
NO_BOUNDS = {"Bound.min", "Bound.max"}


def _models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for info in model.model_fields.values():
        slot = describe_field(info)
        children = slot.models
        if slot.items is not None:
            children += describe_field(FieldInfo(annotation=slot.items)).models
        for child in children:
            yield from _models(child, seen)


FIELDS = [
    (f"{model.__name__}.{name}", info) for model in _models(Recipe, set()) for name, info in model.model_fields.items()
]


def _metadata(annotation: object) -> Iterator[object]:
    for argument in typing.get_args(annotation):
        yield from argument.metadata if isinstance(argument, FieldInfo) else [argument]
        yield from _metadata(argument)


def _is_number(annotation: object) -> bool:
    if annotation in (int, float):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return any(_is_number(argument) for argument in typing.get_args(annotation))


@pytest.mark.parametrize(("name", "info"), FIELDS, ids=[name for name, _ in FIELDS])
def test_a_field_has_role_sentence_and_bounds(name: str, info: FieldInfo) -> None:
    assert field_role(info) in ("meaning", "placement")
    assert info.description
    assert info.description.endswith(".")
    if _is_number(info.annotation) and name not in NO_BOUNDS:
        constraints = [*info.metadata, *_metadata(info.annotation)]
        assert any(isinstance(item, annotated_types.Ge | annotated_types.Gt) for item in constraints)
        assert any(isinstance(item, annotated_types.Le | annotated_types.Lt) for item in constraints)


def test_the_walk_reaches_every_part() -> None:
    names = {name.split(".")[0] for name, _ in FIELDS}
    assert {"Llama", "Qwen3", "Gpt2", "Datasets", "AdaptiveKl", "Bound", "TrainTokenizer", "Cluster"} <= names


def test_every_kind_has_a_version_of_its_mathematics() -> None:
    stages = describe_field(FieldInfo(annotation=Stage))
    assert {typing.get_args(model.model_fields["kind"].annotation)[0] for model in stages.models} == set(SEMANTICS)
    assert set(stages.members) == set(SEMANTICS)


def test_every_family_has_a_stage_that_trains_it() -> None:
    stages = describe_field(FieldInfo(annotation=PretrainFamily)).members
    assert set(stages) == set(FAMILIES)
    for family, stage in stages.items():
        (model,) = stage.models
        built = describe_field(model.model_fields["architecture"]).models
        assert set(FAMILIES[family]) <= set(built), f"{model.__name__} builds no {family}"


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8")
    assert page == markdown_reference(), "run: python -m recipes.reference docs/recipe-reference.md"


def test_the_json_schema_accepts_the_quickstart_and_refuses_a_wrong_one() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from recipes.loading.yaml_text import parse_yaml

    raw = parse_yaml((ROOT / "recipes" / "quickstart.yaml").read_bytes(), "quickstart.yaml").value
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(raw)
    raw["stages"]["base"]["train"]["stpes"] = 1
    assert not validator.is_valid(raw)
