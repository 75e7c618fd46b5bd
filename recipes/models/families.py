"""The families of models that a stage can build, by name, read off the schema."""

from typing import Any, get_args

from recipes.models.architecture import Architecture
from recipes.models.image_models import ImageArchitecture


def _named(union: Any) -> dict[str, tuple[type, ...]]:
    by_family: dict[str, tuple[type, ...]] = {}
    for model in get_args(get_args(union)[0]):
        (family,) = get_args(model.model_fields["family"].annotation)
        by_family[family] = (*by_family.get(family, ()), model)
    return by_family


FAMILIES: dict[str, tuple[type, ...]] = _named(Architecture) | _named(ImageArchitecture)
"""Family name -> the configuration classes of its members."""
