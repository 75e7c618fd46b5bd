"""How a recipe field is declared: its role in the fingerprint, its sentence, its bounds, and quantities with units."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Self, Union, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
)
from pydantic_core import CoreSchema

from recipes.errors import FieldFinding, Finding
from recipes.problem_codes import Code

Role = Literal["meaning", "placement"]


class Strict(BaseModel):
    """A closed, immutable part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, defer_build=True)

    def changed(self, **values: Any) -> Self:
        """A copy with other values, which are not validated."""
        return self.model_copy(update=values)


def meaning(default: Any = ..., *, description: str, **bounds: Any) -> Any:
    """Declare a field that changes what the stage computes; it enters the fingerprint."""
    return Field(default, description=description, json_schema_extra={"role": "meaning"}, **bounds)


def added_meaning(default: Any, *, description: str, **bounds: Any) -> Any:
    """Declare a `meaning` field that joined a kind of stage: it enters the fingerprint where it is not its default.

    The default is what the stage did without the field, so that what was made before keeps its fingerprint.
    """
    return Field(
        default, description=description, json_schema_extra={"role": "meaning", "unless_default": True}, **bounds
    )


def placement(default: Any = ..., *, description: str, **bounds: Any) -> Any:
    """Declare a field that changes where or how often, not what, is computed; it stays out of the fingerprint."""
    return Field(default, description=description, json_schema_extra={"role": "placement"}, **bounds)


@dataclass(frozen=True)
class TagAt:
    """Finds the tag of a union's value below it."""

    path: tuple[str, ...]
    instead: tuple[str, str] | None = None
    """A key, and the tag of a value that has this key instead of the path's first one."""
    default: str | None = None
    """The tag where none is written."""

    @property
    def __name__(self) -> str:
        """pydantic asks every discriminator for its name."""
        return ".".join(self.path)

    def __call__(self, value: Any) -> str | None:
        """The tag as it is written, known or not, else the default; None: there is none."""
        found = value
        for part in self.path:
            found = _read(found, part)
        if found is None and self.instead is not None and _read(value, self.path[0]) is None:
            key, tag = self.instead
            return tag if _read(value, key) is not None else None
        return self.default if found is None else str(found)

    def written(self, value: dict[str, Any]) -> str | None:
        """The tag that a mapping has right below it; None: it has none, and takes that of what it is laid over."""
        if self.path[0] in value:
            return str(value[self.path[0]])
        return self.instead[1] if self.instead is not None and self.instead[0] in value else None


class OneOf(Discriminator):
    """The discriminator of a union that others may join: with one member so far there is nothing to tell apart."""

    def __get_pydantic_core_schema__(self, source_type: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if get_origin(source_type) not in (Union, UnionType):
            return handler(source_type)
        return super().__get_pydantic_core_schema__(source_type, handler)


def _read(value: Any, key: str) -> Any:
    """The value of a mapping's key or of a model's field; None where there is none."""
    if isinstance(value, dict):
        return value.get(key)
    return getattr(value, key, None) if isinstance(value, BaseModel) else None


def _parse_steps(value: Any) -> Any:
    """Accept `50` and `"50 steps"`."""
    return _parse_count(value, "step")


def _parse_iterations(value: Any) -> Any:
    """Accept `5` and `"5 iterations"`; an iteration is several steps, so steps are refused."""
    return _parse_count(value, "iteration")


class FieldError(ValueError):
    """What a validator of the schema has found; pydantic carries it, and `explain` reads its findings."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__("; ".join(finding.message for finding in findings))
        self.findings = findings


class FieldsError(FieldError):
    """What a validator has found at keys of its model, each with its path below the model."""

    def __init__(self, findings: Iterable[FieldFinding]) -> None:
        self.located = tuple(findings)
        super().__init__(*(item.finding for item in self.located))


def refuse(code: Code, message: str) -> NoReturn:
    """Raise FieldError with one finding."""
    raise FieldError(Finding(code, message))


def _parse_count(value: Any, unit: str) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*)\s+([a-z]+)\s*", value)
        if match is None or match.group(2) not in (unit, f"{unit}s"):
            message = f"expected a whole number of {unit}s, for example 50 or '50 {unit}s'"
            refuse(Code.INVALID_FORMAT, message)
        return int(match.group(1))
    return value


def require_divides(model: BaseModel, divisor_key: str, key: str) -> None:
    """Raise FieldError unless the number in one field divides that in another."""
    divisor, number = getattr(model, divisor_key), getattr(model, key)
    if remainder := number % divisor:
        message = f"{divisor_key} ({divisor}) must divide {key} ({number}); remainder {remainder}"
        right = number - remainder or divisor
        raise FieldError(Finding(Code.NOT_DIVISIBLE, message, f"for example {key}: {right}"))


def raise_all(findings: Iterable[Finding]) -> None:
    """Raise FieldError with everything that a check between fields has found; nothing where it found nothing."""
    if found := tuple(findings):
        raise FieldError(*found)


def _refuse_other_numbers(value: Any) -> Any:
    """Refuse true and 2.0 where a Literal of whole numbers would take them for 1 and 2."""
    if isinstance(value, bool | float):
        refuse(Code.WRONG_TYPE, "must be a whole number")
    return value


Whole = BeforeValidator(_refuse_other_numbers)
"""Marks a Literal of whole numbers."""

_Count = Annotated[int, Field(ge=1, le=10**9)]
_WrittenSteps = _Count | Annotated[str, StringConstraints(pattern=r"^\s*[0-9][0-9_]*\s+steps?\s*$")]
_WrittenIterations = _Count | Annotated[str, StringConstraints(pattern=r"^\s*[0-9][0-9_]*\s+iterations?\s*$")]
Steps = Annotated[int, BeforeValidator(_parse_steps, json_schema_input_type=_WrittenSteps), Field(ge=1, le=10**9)]
Iterations = Annotated[
    int, BeforeValidator(_parse_iterations, json_schema_input_type=_WrittenIterations), Field(ge=1, le=10**9)
]
