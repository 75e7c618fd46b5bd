"""Configurations in diffusers' layout: what its classes write, without versions and places."""

import json
from typing import Any

_VOLATILE = ("_diffusers_version", "_name_or_path")


def stock_config(model: Any) -> dict[str, Any]:
    """Return the content of config.json or scheduler_config.json of one of diffusers' objects."""
    content: dict[str, Any] = json.loads(model.to_json_string())
    return {key: value for key, value in content.items() if key not in _VOLATILE}
