"""Columns of prompts' rows that go with the prompts to what rewards the answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.bad_row import BadRow, columns_of


def carried(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the columns of these names, which are plain JSON; raises BadRow."""
    for name in names:
        if name not in row:
            guess = nearest(name, [str(there) for there in row])
            suggestion = f"did you mean {guess}?" if guess else columns_of(row)
            raise BadRow(f"no column {name!r}, which a reward reads", suggestion, Code.MISSING_COLUMN)
        if not _is_plain(row[name]):
            raise BadRow(f"column {name!r}, which a reward reads, is {type(row[name]).__name__}, not plain JSON")
    return {name: row[name] for name in names}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
