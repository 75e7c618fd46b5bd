"""The sources shown in docs/data.md are valid recipes' parts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.loading.schema_paths import describe_field

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
SOURCES = [line for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def tags(union: Any) -> set[str]:
    """Names that `source` takes in a union of sources."""
    return set(describe_field(FieldInfo(annotation=union)).members)


@pytest.mark.parametrize("line", SOURCES)
def test_sources_shown_are_valid(line: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Source | ImageSource)
    adapter.validate_python(yaml.safe_load(line)["data"])


def test_every_kind_of_source_is_shown() -> None:
    shown = {yaml.safe_load(line)["data"].get("source", "mix") for line in SOURCES}
    assert shown == tags(Source) | tags(ImageSource)
