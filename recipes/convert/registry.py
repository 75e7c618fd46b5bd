"""The systems whose files are converted, and which one a file is of."""

from collections.abc import Mapping
from typing import Any

from recipes.convert.command_line import COMMAND
from recipes.convert.rules import Choice
from recipes.convert.system import System
from recipes.convert.systems import accelerate, axolotl, deepspeed, llama_factory, llama_factory_v1, openrlhf, trl, verl
from recipes.errors import RequestError
from recipes.nearest import nearest

SYSTEMS: dict[str, System] = {
    module.SYSTEM.name: module.SYSTEM
    for module in (axolotl, llama_factory, trl, llama_factory_v1, openrlhf, verl, deepspeed, accelerate)
}


def find_system(name: str) -> System:
    """The system of a name; raises RequestError with those that there are."""
    if name not in SYSTEMS:
        guess = nearest(name, list(SYSTEMS))
        hint = f"did you mean {guess}?" if guess else "there are: " + ", ".join(SYSTEMS)
        raise RequestError(f"--from {name}: no such system; {hint}")
    return SYSTEMS[name]


def recognise(value: Mapping[str, Any], file: str) -> tuple[System, list[str]]:
    """The system whose keys a file has, and these keys; raises RequestError where none or several are meant."""
    command = value.get(COMMAND)
    if command is not None and (run := [system for system in SYSTEMS.values() if _runs(system, command)]):
        return run[0], [str(command)]
    flat = flat_keys(value)
    found = {name: sorted(system.marks & flat) for name, system in SYSTEMS.items()}
    found = {name: keys for name, keys in found.items() if keys}
    if len(found) == 1:
        ((name, keys),) = found.items()
        return SYSTEMS[name], keys
    listed = ", ".join(SYSTEMS)
    if not found:
        there = ", ".join(str(key) for key in list(value)[:8]) or "none"
        raise RequestError(f"{file}: its keys ({there}) are of none of {listed}; --from NAME says which it is of")
    each = "; ".join(f"{SYSTEMS[name].title}: {', '.join(keys[:4])}" for name, keys in found.items())
    raise RequestError(f"{file}: has keys of several systems ({each}); --from NAME says which it is of")


def _runs(system: System, command: str) -> bool:
    entry = system.table.get(COMMAND)
    return isinstance(entry, Choice) and command in entry.cases


def flat_keys(value: Mapping[str, Any]) -> set[str]:
    """Keys, those inside mappings by their path with dots too."""
    found: set[str] = set()
    for key, item in value.items():
        parts = str(key).split(".")
        found |= {".".join(parts[: depth + 1]) for depth in range(len(parts))}
        if isinstance(item, Mapping):
            found |= {f"{key}.{inner}" for inner in flat_keys(item)}
    return found
