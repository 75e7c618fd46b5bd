"""Metrics of a manifest as a table: a row a metric, a column a model, the truth first and noise last."""

from collections.abc import Mapping
from typing import Any

from recipes.stages.suites import NOISE, TRUTH

ByModel = tuple[list[str], dict[str, dict[str, Any]], dict[str, Any]]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; lists and texts are kept as they are."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def by_model(metrics: Mapping[str, Any]) -> ByModel:
    """Return the models, the metrics of the form model.metric by metric and model, and the others."""
    heads = [name for name, value in metrics.items() if isinstance(value, Mapping)]
    heads += [name.split(".")[0] for name in metrics if "." in name]
    models = sorted(dict.fromkeys(heads), key=lambda model: {TRUTH: 0, NOISE: 2}.get(model, 1))
    table: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for name, value in flatten(metrics).items():
        model, _, metric = name.partition(".")
        if value is None:
            continue
        if metric and model in models:
            table.setdefault(metric, {})[model] = value
        else:
            plain[name] = value
    return models, table, plain


def text_table(models: list[str], table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of the table as a terminal shows them."""
    cells = [["", *models]]
    cells += [[metric, *(_cell(row.get(model)) for model in models)] for metric, row in table.items()]
    widths = [max(len(row[place]) for row in cells) for place in range(len(models) + 1)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
