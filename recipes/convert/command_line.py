"""Command lines of other systems: a shell script, or arguments alone, as keys and values."""

import os
import re
import shlex
from typing import Any

import yaml

from recipes.errors import Problem, RecipeError
from recipes.problem_codes import Code

COMMAND = "command"
"""The key of what is run, as `train_sft` of `openrlhf.cli.train_sft`."""
_RUNS = re.compile(r"(?:openrlhf\.cli\.|openrlhf/cli/)(train_\w+)(?:\.py)?|verl\.trainer\.(\w+)|trl/scripts/(\w+)\.py")
_ASSIGNS = re.compile(r"(?:export\s+|local\s+)?([A-Za-z_]\w*)=(.*)")
_OVERRIDE = re.compile(r"[+~]{0,2}([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)(?::?-([^}]*))?\}?")
_ARRAY = re.compile(r"^\s*([A-Za-z_]\w*)=\((.*?)^\s*\)", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"\$\{?([A-Za-z_]\w*)(?:\[[@*]\])?\}?")
_ENDS = {"|", "||", "&&", "&", ";", ">", ">>", "2>&1", "EOF"}


def is_command(text: str, suffix: str) -> bool:
    """Whether a text is a command line, or a script with one, rather than YAML or JSON."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return suffix in (".sh", ".bash") or first.startswith(("#!", "--")) or _RUNS.search(first) is not None


def read_command(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The arguments of the one training command in a text, by key, and their lines; raises RecipeError."""
    variables: dict[str, str] = {"HOME": os.path.expanduser("~")}
    arrays = {match[1]: match[2] for match in _ARRAY.finditer(text)}
    commands: list[tuple[str | None, list[str]]] = []
    for line in _logical_lines(text):
        words = _split(line)
        if found := _find_run(words):
            commands.append(found)
        elif len(words) == 1 and (assigned := _ASSIGNS.fullmatch(words[0])) and "$(" not in assigned[2]:
            variables[assigned[1]] = _expand(assigned[2], variables)
    if not commands and (words := [word for line in _logical_lines(text) for word in _split(line)]):
        commands = [(None, words)] if words[0].startswith("--") or _OVERRIDE.fullmatch(words[0]) else []
    if len(commands) != 1:
        message = (
            "no command of OpenRLHF, verl or TRL is found in it"
            if not commands
            else f"{len(commands)} training commands; one is converted at a time: keep one"
        )
        raise RecipeError([Problem(Code.INVALID_FORMAT, name, None, "", "", message)])
    run, words = commands[0]
    value = {COMMAND: run} if run is not None else {}
    value |= _arguments([part for word in words for part in _parts(word, variables, arrays)])
    lines = text.splitlines()
    return value, {key: number for key in value if (number := _line_of(key, lines))}


def _logical_lines(text: str) -> list[str]:
    """Lines without comments, those that a backslash continues joined."""
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in re.sub(r"\\\s*\n", " ", "\n".join(kept)).splitlines() if line.strip()]


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


def _find_run(words: list[str]) -> tuple[str, list[str]] | None:
    """What is run and its arguments, where a line runs a training."""
    for index, word in enumerate(words):
        found = _RUNS.search(word)
        command = next((group for group in found.groups() if group), None) if found else None
        if word == "trl" and index + 1 < len(words) and not words[index + 1].startswith("-"):
            index, command = index + 1, words[index + 1]
        if command is not None:
            arguments = words[index + 1 :]
            end = next((place for place, part in enumerate(arguments) if part in _ENDS), len(arguments))
            return command, arguments[:end]
    return None


def _parts(word: str, variables: dict[str, str], arrays: dict[str, str]) -> list[str]:
    """A word with its variables; one that is an array of arguments, or a text of several, becomes all of them."""
    found = _NAMED.fullmatch(word)
    if found is not None and (listed := arrays.get(found[1])) is not None:
        lines = _logical_lines(listed)
        return [part for line in lines for inner in _split(line) for part in _parts(inner, variables, {})]
    expanded = _expand(word, variables)
    is_several = found is not None and " " in expanded.strip() and ("=" in expanded or "--" in expanded)
    return _split(expanded) if is_several else [expanded]


def _expand(word: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        known = variables.get(match[1], match[2])
        return match[0] if known is None else known

    return _VARIABLE.sub(value, word)


def _arguments(words: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b`, `--key`, and Hydra's `key=value`."""
    value: dict[str, Any] = {}
    key: str | None = None
    for word in words:
        if word in ("$@", "${@}", "$*", "\\") or not word:
            continue
        if word.startswith("--"):
            key, equals, rest = word[2:].partition("=")
            value[key] = _typed(rest) if equals else True
            key = None if equals else key
        elif (found := _OVERRIDE.fullmatch(word)) and key is None:
            value[found[1]] = _typed(found[2])
        elif key is not None:
            there = value[key]
            value[key] = (
                _typed(word) if there is True else [*(there if isinstance(there, list) else [there]), _typed(word)]
            )
    return value


def _typed(text: str) -> Any:
    """A value as YAML reads it, else as text."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return found if isinstance(found, bool | int | float | list | dict) or found is None else text


def _line_of(key: str, lines: list[str]) -> int | None:
    pattern = re.compile(rf"(?:--|^|[\s+]){re.escape(key)}(?:[\s=\\]|$)")
    numbers = (number for number, line in enumerate(lines, 1) if not line.lstrip().startswith("#"))
    return next((number for number in numbers if pattern.search(lines[number - 1])), None)
