"""Which parameters of a test run in the default tier, and which in the long one (`make test-long`)."""

from collections.abc import Collection, Iterable
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

T = TypeVar("T")


def tiered(values: Iterable[T], default: Collection[T]) -> list[ParameterSet]:
    """The values, a tuple for several names; those that are not in `default` are marked long."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in default else pytest.mark.long
        )
        for value in values
    ]


def wants_long(request: pytest.FixtureRequest) -> bool:
    """Whether a long test of this file is to run: what it needs may be made only then."""
    return any(item.path == request.path and item.get_closest_marker("long") for item in request.session.items)
