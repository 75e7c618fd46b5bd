"""Names of classes that the `datasets` library keeps beside the numbers of a ClassLabel."""

from collections.abc import Mapping, Sequence
from typing import Any


def class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the names of every column of classes, of features as the library writes them into JSON."""
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def named_classes(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a row with names instead of numbers; -1, the library's mark for no label, is None."""
    for column, names in classes.items():
        number = row.get(column)
        if isinstance(number, int) and -1 <= number < len(names):
            row[column] = None if number == -1 else names[number]
    return row
