"""The table of model types is what the pinned transformers has, and what was measured on tiny models of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from recipes.models.type_page import page_with_table
from recipes.models.type_table import FILE, type_records
from tests.tiers import tiered
from trainers.inference.describe import all_types, config_keys, describe, stock_classes, to_json
from trainers.models.counting import counted_model

PROJECT = Path(__file__).resolve().parents[3]
MEASURED = ("cohere", "mistral", "mamba")
"""Types that are measured again in the default tier."""


def plain(keys: Any) -> dict[str, Any]:
    """Keys as a JSON file holds them."""
    return dict(json.loads(json.dumps(dict(keys))))


def test_every_type_is_in_the_table_with_the_library_s_keys_and_classes() -> None:
    known = type_records()
    assert set(known) == set(all_types())
    for name, record in known.items():
        assert (record.family, record.classes) == stock_classes(name)
        keys = plain(config_keys(transformers.CONFIG_MAPPING[name]))
        assert plain(record.keys.items()) == keys, f"{name}: run python -m trainers.inference.describe {name}"


@pytest.mark.parametrize("name", tiered(sorted(type_records()), MEASURED))
def test_a_type_is_measured_as_the_table_says(name: str) -> None:
    record = type_records()[name]
    try:
        assert to_json({name: describe(name)}) == to_json({name: record})
    finally:
        type_records()[name] = record


def test_the_file_is_written_in_one_way() -> None:
    assert FILE.read_text(encoding="utf-8") == to_json(type_records())


def test_the_page_of_families_has_the_table() -> None:
    page = (PROJECT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page_with_table(page) == page, "run python -m recipes.models.type_page docs/families.md"


@pytest.mark.parametrize("name", ["mistral", "mixtral", "opt", "falcon"])
def test_a_model_is_counted_as_it_is_built(name: str) -> None:
    from trainers.models.tiny import tiny_config

    config = tiny_config(transformers.CONFIG_MAPPING[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    known = counted_model(config.to_dict())
    assert known is not None
    assert known.architecture.num_parameters(known.vocab_size) == model.num_parameters()
    labelled = transformers.AutoModelForSequenceClassification.from_config(
        tiny_config(transformers.CONFIG_MAPPING[name], num_labels=1)
    )
    assert known.architecture.num_parameters(known.vocab_size, "score") == labelled.num_parameters()
    linears = {linear.name for linear in known.architecture.linears()}
    assert linears == set(type_records()[name].linears)
