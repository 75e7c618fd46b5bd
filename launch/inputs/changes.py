"""What differs between what a run computes and what a recipe asks for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One field of a stage's meaning that differs from the run's."""

    stage: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.before)} in the run, {_short(self.after)} at present"


def differing_values(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """What differs between two nested mappings, by dotted name."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_values(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(Change("", f"{prefix}{key}", old, new))
    return found


def changed_meaning(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """What differs in the stages' own meaning; a parent's difference is reported at the parent only."""
    found = []
    for stage in sorted(before.keys() | after.keys()):
        own_before = {key: value for key, value in before.get(stage, {}).items() if key != "parents"}
        own_after = {key: value for key, value in after.get(stage, {}).items() if key != "parents"}
        for item in differing_values(own_before, own_after, f"stages.{stage}."):
            found.append(Change(stage, item.field.replace(".settings.", ".", 1), item.before, item.after))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
