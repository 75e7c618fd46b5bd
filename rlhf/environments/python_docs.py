"""Looking up Python's documentation: what pydoc says of a name of the standard library."""

import importlib
import inspect
import pydoc
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from recipes.stages.environments import PythonDocsEnvironment
from recipes.stages.rewards.term import Row
from rlhf.environments.protocol import Step

UNOPENED = frozenset(
    {"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "tkinter", "turtle", "test", "__main__"}
)
"""Modules that do something when they are imported, or that need a screen."""


@dataclass
class PythonDocs:
    """Answers calls with the first lines of what the documentation says of a name."""

    spec: PythonDocsEnvironment

    def reset(self, row: Row) -> str:
        """There is no first observation."""
        return ""

    def step(self, action: str) -> Step:
        """What is documented of the name that is called; a turn without a call is the last one."""
        called = self.spec.call(action)
        return Step(done=True) if called is None else Step(self.spec.observation(look_up(called)))


@lru_cache(maxsize=4096)
def look_up(name: str) -> str:
    """Signature and description of a built-in or a name of the standard library, as `str.join` or `math.gcd`."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return f"{name[:80]!r} is no name"
    found = _found(parts)
    if found is None:
        return f"no documentation of {name[:80]}"
    text = pydoc.getdoc(found)
    return f"{name}{_signature(found)}: {text}" if text else f"no documentation of {name[:80]}"


def _found(parts: list[str]) -> Any:
    """The object of a dotted name: a built-in, or in the longest module of the standard library that it begins with."""
    builtins: Mapping[str, Any] = vars(importlib.import_module("builtins"))
    if parts[0] in builtins:
        return _attribute(builtins[parts[0]], parts[1:])
    if parts[0] not in sys.stdlib_module_names or parts[0] in UNOPENED or parts[-1] == "__main__":
        return None
    for length in range(len(parts), 0, -1):
        try:
            with warnings.catch_warnings(action="ignore"):  # of modules that a later Python will not have
                module = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return _attribute(module, parts[length:])
    return None


def _attribute(found: Any, names: list[str]) -> Any:
    for name in names:
        found = inspect.getattr_static(found, name, None)
        if found is None:
            return None
    return found


def _signature(found: Any) -> str:
    try:
        return str(inspect.signature(found))
    except (TypeError, ValueError):
        return ""
