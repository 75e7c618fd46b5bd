"""The environment of this process."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def variables(values: dict[str, str], without: tuple[str, ...] = ()) -> Iterator[None]:
    """Sets and removes variables of this process for a while."""
    touched = {*values, *without}
    before = {key: os.environ.get(key) for key in touched}
    for key in without:
        os.environ.pop(key, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
