"""Strict YAML: one document of plain data with YAML 1.2 scalars, no aliases, tags or duplicate keys, and bounded size.

PyYAML's own resolver is not used: it reads `1e-4` as a string and `no` as false, and lets duplicate keys pass.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from recipes.errors import Problem, RecipeError
from recipes.places import Mark, Path, path_text, shorten
from recipes.problem_codes import Code

MAX_BYTES = 1 << 20
MAX_DEPTH = 24
MAX_NODES = 20_000
MAX_NUMBER_CHARACTERS = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+(?:\.[0-9]*)?")
_OTHER_BASE = re.compile(r"0[xob][0-9A-Fa-f]+")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class Document:
    """The plain data of one YAML text, the place of each of its values, and what is forbidden in it."""

    value: Any
    marks: dict[Path, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse_yaml(data: bytes | str, file: str, marked: bool = True) -> Document:
    """Parse one YAML document and collect its problems; raises RecipeError where it cannot be read on."""
    return _Composer(_decode(data, file), file, marked).compose()


def _decode(data: bytes | str, file: str) -> str:
    if len(data) > MAX_BYTES:
        raise RecipeError(
            [
                Problem(
                    Code.RECIPE_TOO_LARGE,
                    file,
                    None,
                    "",
                    f"{len(data)} bytes",
                    f"a recipe has at most {MAX_BYTES} bytes",
                )
            ]
        )
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{data[error.start]:02x}"
            raise RecipeError([Problem(Code.NOT_UTF8, file, line, "", found, "the file is not UTF-8 text")]) from None
    else:
        text = data
    if match := _FORBIDDEN.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise RecipeError(
            [
                Problem(
                    Code.CONTROL_CHARACTER,
                    file,
                    line,
                    "",
                    f"U+{ord(match.group()):04X}",
                    "control characters are not allowed",
                )
            ]
        )
    return text


def scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar by YAML 1.2's core schema; raises ValueError for what people misread."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _NON_FINITE.fullmatch(text):
        raise ValueError("infinities and NaN are not allowed")
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError("a number must not start with 0; quote it if it is text")
    if _OTHER_BASE.fullmatch(text):
        raise ValueError("numbers are decimal; quote it if it is text")
    if _FLOAT.fullmatch(text):
        if len(text) > MAX_NUMBER_CHARACTERS:
            raise ValueError(f"a number has at most {MAX_NUMBER_CHARACTERS} characters")
        if _INT.fullmatch(text):
            return int(text)
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError("the number is too large")
        return number
    return text


class _Composer:
    """Builds plain data from the parser's events with a bounded depth and collects what is forbidden."""

    def __init__(self, text: str, file: str, marked: bool) -> None:
        self.loader = _Loader(text)
        self.file = file
        self.marked = marked
        self.document = Document(None)
        self.problems = self.document.problems
        self.num_nodes = 0

    def compose(self) -> Document:
        try:
            event = self._next()
            while not isinstance(event, yaml.DocumentStartEvent | yaml.StreamEndEvent):
                event = self._next()
            if isinstance(event, yaml.StreamEndEvent):
                raise self._fatal(Code.INVALID_YAML, event, "", "the file is empty")
            self.document.value = self._node(self._next(), ())
            self._next()
            event = self._next()
            if not isinstance(event, yaml.StreamEndEvent):
                raise self._fatal(Code.INVALID_YAML, event, "---", "a recipe is one YAML document")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            message = f"not valid YAML: {error.problem or error.context}"
            if mark is not None:
                message += f" (column {mark.column + 1})"
            line = self._line(mark.line) if mark is not None else None
            raise RecipeError([*self.problems, Problem(Code.INVALID_YAML, self.file, line, "", "", message)]) from None
        except yaml.YAMLError as error:
            message = f"not valid YAML: {error}".splitlines()[0]
            raise RecipeError([*self.problems, Problem(Code.INVALID_YAML, self.file, None, "", "", message)]) from None
        finally:
            self.loader.dispose()
        return self.document

    def _next(self) -> Any:
        return self.loader.get_event()

    def _line(self, line: int) -> int | None:
        return line + 1 if self.marked else None

    def _mark(self, event: Any) -> Mark:
        return Mark(self.file, self._line(event.start_mark.line))

    def _fatal(self, code: Code, event: Any, found: str, message: str, path: Path = ()) -> RecipeError:
        return RecipeError([*self.problems, self._problem(code, event, path, found, message)])

    def _problem(self, code: Code, event: Any, path: Path, found: str, message: str, suggestion: str = "") -> Problem:
        line = self._line(event.start_mark.line)
        return Problem(code, self.file, line, path_text(path), shorten(found), message, suggestion)

    def _node(self, event: Any, path: Path) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self._fatal(Code.RECIPE_TOO_LARGE, event, "", f"a recipe has at most {MAX_NODES} values")
        if len(path) > MAX_DEPTH:
            raise self._fatal(
                Code.RECIPE_TOO_LARGE, event, "", f"a recipe is at most {MAX_DEPTH} levels deep", path[:3]
            )
        if isinstance(event, yaml.AliasEvent):
            self.problems.append(
                self._problem(
                    Code.UNSUPPORTED_YAML, event, path, f"*{event.anchor}", "aliases are not allowed", "use `extends`"
                )
            )
            return None
        if event.anchor is not None:
            self.problems.append(
                self._problem(
                    Code.UNSUPPORTED_YAML, event, path, f"&{event.anchor}", "anchors are not allowed", "use `extends`"
                )
            )
        if event.tag is not None:
            self.problems.append(
                self._problem(
                    Code.UNSUPPORTED_YAML, event, path, event.tag, "YAML tags are not allowed", "write the plain value"
                )
            )
        self.document.marks.setdefault(path, self._mark(event))
        if isinstance(event, yaml.ScalarEvent):
            if not event.implicit[0] or event.tag is not None:
                return event.value
            try:
                return scalar(event.value)
            except ValueError as error:
                self.problems.append(self._problem(Code.UNSUPPORTED_NUMBER, event, path, event.value, str(error)))
                return None
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                items.append(self._node(event, (*path, len(items))))
            return items
        return self._mapping(path)

    def _mapping(self, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._fatal(Code.INVALID_YAML, event, "", "a key must be plain text", path)
            key = event.value
            if key == "<<" and event.implicit[0]:
                self.problems.append(
                    self._problem(
                        Code.UNSUPPORTED_YAML, event, path, "<<", "merge keys are not allowed", "use `extends`"
                    )
                )
            if event.anchor is not None:
                self.problems.append(
                    self._problem(Code.UNSUPPORTED_YAML, event, path, f"&{event.anchor}", "anchors are not allowed")
                )
            here = (*path, key)
            if key in values:
                first = self.document.marks[here].line
                self.problems.append(
                    self._problem(
                        Code.DUPLICATE_KEY,
                        event,
                        here,
                        key,
                        f"the key is given twice; first in line {first}",
                        "remove one of the two",
                    )
                )
                self._node(self._next(), (*here, "(again)"))
                continue
            self.document.marks[here] = self._mark(event)
            values[key] = self._node(self._next(), here)
        return values
