"""A system whose files are converted: its keys, its defaults, and how its files are recognised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.convert.draft import Draft
from recipes.convert.rules import Table


@dataclass(frozen=True, slots=True)
class System:
    """Another system. Adding one is a file in `systems/` and a line in `registry.py`."""

    name: str
    """As `--from` takes it."""
    title: str
    """As people write it."""
    marks: frozenset[str]
    """Keys that only its files have."""
    table: Table
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What counts where the file does not say it, in its own keys."""
    command_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Other defaults by what is run, or by the kind of stage where a file does not say it."""
    unless: Mapping[str, str] = field(default_factory=dict)
    """Defaults that do not count where the file has the other key."""
    former_names: Mapping[str, str] = field(default_factory=dict)
    """Keys by the names that they had before; both are read."""
    is_flat: bool = False
    """Whether keys inside mappings are named by their path with dots."""
    is_whole: bool = True
    """Whether a file of it describes a training run; else only a part of one, such as how it is sharded."""
    finish: Callable[[Draft], None] = lambda draft: None
    """What its keys make of each other; called before its data sets are read."""
    trains: Callable[[Mapping[str, Any]], bool] = lambda value: True
    """Whether a file of it trains a model, rather than serving or merging one."""
    kind_of: Callable[[Mapping[str, Any]], str | None] = lambda value: None
    """The kind of stage that a file needs, where it says so whatever else is refused."""
