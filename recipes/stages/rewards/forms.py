"""Rules on the form of a response: patterns, tags, JSON, length."""

import json
import unicodedata
from typing import Annotated, Any, Literal, NoReturn

import regex
from pydantic import Field, field_validator, model_validator

from recipes.errors import StageError
from recipes.fields import meaning, refuse
from recipes.problem_codes import Code
from recipes.stages.rewards.answers import answer_text
from recipes.stages.rewards.term import Row, Rule

PATTERN_LIMIT_S = 2.0
"""Time of a search: a pattern that backtracks past it ends the stage, because a reward that depends on the machine's
speed could not be repeated."""


class RegularExpression(Rule):
    """1 where a pattern is found in the response, or where what it finds is the row's; else 0."""

    rule: Literal["regex"] = meaning(description="A regular expression finds something in the response.")
    pattern: str = meaning(min_length=1, description="In Python's syntax; `(?s)` lets a dot be a line break.")
    whole: bool = meaning(False, description="The whole response must match, without the space around it.")
    column: str | None = meaning(
        None,
        min_length=1,
        description="What is found (the pattern's first group where it has one) must equal this column of the "
        "prompt's row; null: anything found counts.",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except regex.error as error:
            refuse(Code.INVALID_FORMAT, f"not a regular expression: {error}")
        return pattern

    @property
    def carried(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    @property
    def answer_column(self) -> str | None:
        return self.column

    def row_rule(self, row: Row) -> str:
        if self.column is None or answer_text(row[self.column]) is not None:
            return ""
        return f"column {self.column!r} is {type(row[self.column]).__name__}, not text or a number"

    def value(self, text: str, row: Row) -> float:
        compiled = regex.compile(self.pattern)
        try:
            if self.whole:
                found = compiled.fullmatch(text.strip(), timeout=PATTERN_LIMIT_S)
            else:
                found = compiled.search(text, timeout=PATTERN_LIMIT_S)
        except TimeoutError:
            raise StageError(
                f"the pattern {self.pattern!r} takes more than {PATTERN_LIMIT_S:g} s on a response of {len(text):,} "
                "characters because it backtracks; make repetitions possessive (`a++`) or groups atomic (`(?>...)`)"
            ) from None
        if found is None:
            return 0.0
        if self.column is None:
            return 1.0
        taken = found.group(1 if compiled.groups else 0) or ""
        wanted = answer_text(row[self.column]) or ""
        return float(_form(taken) == _form(wanted))


class Tags(Rule):
    """1 where the response is these tags one after the other, `<think>...</think>`, each once, else 0."""

    rule: Literal["format"] = meaning(description="The response consists of tags in their order.")
    tags: list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]] = meaning(
        min_length=1, max_length=32, description="Their names, for example [think, answer]."
    )
    outside: bool = meaning(False, description="Whether text may stand before, between and after the tags.")

    @model_validator(mode="after")
    def _distinct(self) -> "Tags":
        if repeated := [tag for tag in self.tags if self.tags.count(tag) > 1]:
            refuse(Code.DUPLICATE_ITEM, f"tags names {repeated[0]!r} twice")
        return self

    def value(self, text: str, row: Row) -> float:
        end = 0
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return 0.0
            start, stop = text.index(opening), text.index(closing)
            if not end <= start < stop or (text[end:start].strip() and not self.outside):
                return 0.0
            end = stop + len(closing)
        return float(self.outside or not text[end:].strip())


class JsonSchema(Rule):
    """1 where the whole response is a JSON document that a schema (draft 2020-12) accepts, else 0."""

    rule: Literal["json_schema"] = meaning(description="The response is JSON that a schema accepts.")
    schema_: dict[str, Any] = meaning(
        alias="schema", description="The schema, written as YAML; `$ref` reaches into itself alone."
    )

    @field_validator("schema_")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        from jsonschema import Draft202012Validator, SchemaError

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            refuse(Code.INVALID_FORMAT, f"not a JSON schema at {error.json_path}: {error.message}")
        return schema

    def value(self, text: str, row: Row) -> float:
        from jsonschema import Draft202012Validator
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        try:
            found = json.loads(text, parse_constant=_no_json)
            return float(Draft202012Validator(self.schema_, registry=Registry()).is_valid(found))
        except Unresolvable as error:
            raise StageError(f"rule json_schema: the schema refers to {error.ref!r}, which it does not hold") from None
        except (ValueError, RecursionError):
            return 0.0


class Length(Rule):
    """1 within the bounds; outside it falls in a line to 0 over `slack` words or characters."""

    rule: Literal["length"] = meaning(description="The response's length is within bounds.")
    unit: Literal["words", "characters"] = meaning("words", description="What is counted.")
    min: int = meaning(0, ge=0, le=10**9, description="The least that is worth 1.")
    max: int | None = meaning(None, ge=0, le=10**9, description="The most that is worth 1; null: no bound.")
    slack: int = meaning(0, ge=0, le=10**9, description="How far past a bound something is still worth more than 0.")

    @model_validator(mode="after")
    def _bounds(self) -> "Length":
        if self.min == 0 and self.max is None:
            refuse(Code.MISSING_KEY, "give min, max or both")
        if self.max is not None and self.max < self.min:
            refuse(Code.OUT_OF_RANGE, f"max ({self.max}) is below min ({self.min})")
        return self

    def value(self, text: str, row: Row) -> float:
        length = len(text.split()) if self.unit == "words" else len(text)
        over = 0 if self.max is None else length - self.max
        past = max(self.min - length, over, 0)
        return max(0.0, 1 - past / (self.slack + 1)) if past else 1.0


def _form(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
