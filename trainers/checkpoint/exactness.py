"""How exactly a stage that was interrupted equals one that was not: derived from where its parts ran (pure).

bit-exact     every part ran on as many workers, of the same kind, with the same libraries: the same bits
order-exact   the same sample ids in the same order and the same noise; sums may be rounded otherwise
continuing    settings were changed on the way by request: neither
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

ExactnessClass = Literal["bit-exact", "order-exact", "continuing"]


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Say what differs between the conditions of two parts of a stage, as `workers: 2, then 1`."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name, 'unknown')}, then {after.get(name, 'unknown')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def exactness_class(differing: Sequence[str], changes: Sequence[Any]) -> ExactnessClass:
    """Return the class of a stage from all that differed at its resumes and all that was changed by request."""
    if changes:
        return "continuing"
    return "order-exact" if differing else "bit-exact"


def describe_exactness(differing: Sequence[str], changes: Sequence[Mapping[str, Any]]) -> str:
    """Return the class with its reasons, as manifests and the command line show it."""
    reasons = [*(f"{change['field']} changed at step {change['step']}" for change in changes), *differing]
    shown = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{exactness_class(differing, changes)}{shown}"
