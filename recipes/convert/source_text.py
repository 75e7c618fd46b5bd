"""Files of other systems as plain data with the line of each value: YAML as PyYAML reads it, JSON, command lines."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes.convert.command_line import is_command, read_command
from recipes.convert.rules import Place
from recipes.errors import Problem, RecipeError
from recipes.loading.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_NODES
from recipes.places import Mark, path_text
from recipes.problem_codes import Code

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
_TIME = "tag:yaml.org,2002:timestamp"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of another system."""

    name: str
    value: dict[str, Any]
    working_dir: Path
    """Where its relative paths start."""
    marks: dict[Place, Mark] = field(default_factory=dict)


def read_source(path: Path, working_dir: Path) -> SourceFile:
    """Read a file; raises RecipeError with what is wrong with it."""
    name = str(path)
    text = _read_text(path)
    if is_command(text, path.suffix):
        value, lines = read_command(text, name)
        return SourceFile(name, value, working_dir, {(key,): Mark(name, line) for key, line in lines.items()})
    if text.lstrip().startswith("{"):
        return SourceFile(name, _read_json(text, name), working_dir)
    composer = _Composer(name)
    return SourceFile(name, composer.read(text), working_dir, composer.marks)


def _error(name: str, code: Code, line: int | None, message: str, place: Place = (), found: str = "") -> RecipeError:
    return RecipeError([Problem(code, name, line, path_text(place), found, message)])


def _read_text(path: Path) -> str:
    name = str(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _error(name, Code.RECIPE_NOT_READABLE, None, f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise _error(name, Code.RECIPE_TOO_LARGE, None, f"a configuration has at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(name, Code.NOT_UTF8, line, "the file is not UTF-8 text") from None
    if not text.strip():
        raise _error(name, Code.INVALID_YAML, None, "the file is empty")
    return text


def _read_json(text: str, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise _error(name, Code.DUPLICATE_KEY, None, "the key is given twice; remove one of the two", (repeated,))
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise _error(name, Code.INVALID_YAML, line, f"not valid JSON: {getattr(error, 'msg', 'too deep')}") from None
    assert isinstance(value, dict)
    return value


class _Composer:
    """Builds plain data from PyYAML's nodes, anchors and merge keys resolved, with a bounded size."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.marks: dict[Place, Mark] = {}
        self.num_nodes = 0
        self.constructor: Any = yaml.constructor.SafeConstructor()

    def read(self, text: str) -> dict[str, Any]:
        try:
            documents = [document for document in yaml.compose_all(text, Loader=_Loader) if not _is_empty(document)]
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            message = f"not valid YAML: {error.problem or error.context}"
            raise _error(self.name, Code.INVALID_YAML, mark.line + 1 if mark else None, message) from None
        except yaml.YAMLError as error:
            raise _error(self.name, Code.INVALID_YAML, None, f"not valid YAML: {error}".splitlines()[0]) from None
        if len(documents) != 1:
            line = documents[1].start_mark.line + 1 if documents else None
            message = f"a configuration is one YAML document; found {len(documents)}"
            raise _error(self.name, Code.INVALID_YAML, line, message)
        (node,) = documents
        if not isinstance(node, yaml.MappingNode):
            raise _error(self.name, Code.WRONG_TYPE, node.start_mark.line + 1, "must be a mapping of keys to values")
        value = self._value(node, ())
        assert isinstance(value, dict)
        return value

    def _value(self, node: Any, place: Place) -> Any:
        line = node.start_mark.line + 1
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(place) > MAX_DEPTH:
            message = f"a configuration has at most {MAX_NODES} values, {MAX_DEPTH} levels deep"
            raise _error(self.name, Code.RECIPE_TOO_LARGE, line, message)
        self.marks.setdefault(place, Mark(self.name, line))
        if isinstance(node, yaml.MappingNode):
            return dict(self._pairs(node, place))
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, index)) for index, item in enumerate(node.value)]
        if node.tag == _TIME:
            return node.value
        if node.tag not in _PLAIN:
            raise _error(self.name, Code.UNSUPPORTED_YAML, line, "YAML tags are not read", place, node.tag)
        try:
            return self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError):
            return node.value

    def _pairs(self, node: Any, place: Place) -> Iterator[tuple[str, Any]]:
        """Keys and values; those of merged mappings come first, so that the mapping's own win."""
        own = [(key, value) for key, value in node.value if key.tag != _MERGE]
        for merged in (value for key, value in node.value if key.tag == _MERGE):
            mappings = reversed(merged.value) if isinstance(merged, yaml.SequenceNode) else [merged]
            for mapping in mappings:
                if not isinstance(mapping, yaml.MappingNode):
                    line = merged.start_mark.line + 1
                    raise _error(self.name, Code.INVALID_YAML, line, "`<<` merges mappings alone", place)
                yield from self._value(mapping, place).items()
        seen: dict[str, int] = {}
        for key, value in own:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _error(self.name, Code.INVALID_YAML, line, "a key must be plain text", place)
            here = (*place, key.value)
            if key.value in seen:
                message = f"the key is given twice; first in line {seen[key.value]}; remove one of the two"
                raise _error(self.name, Code.DUPLICATE_KEY, line, message, here)
            seen[key.value] = line
            self.marks[here] = Mark(self.name, line)
            yield key.value, self._value(value, here)


def _is_empty(node: Any) -> bool:
    return node is None or (isinstance(node, yaml.ScalarNode) and not node.value)
