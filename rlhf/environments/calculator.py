"""A calculator with exact answers: arithmetic is read as Python's, and evaluated as fractions, never run."""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from recipes.stages.environments import CalculatorEnvironment
from recipes.stages.rewards.term import Row
from rlhf.environments.protocol import Step

MOST_CHARACTERS, MOST_DIGITS, MOST_POWER = 200, 60, 64
"""Longest expression, longest number on the way, largest exponent: so that no call takes long."""

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, other: Fraction(one // other),
    ast.Mod: operator.mod,
}


class CalculatorError(ValueError):
    """What is no arithmetic, or more than a calculator's worth."""


@dataclass
class Calculator:
    """Answers calls with the value of their expression."""

    spec: CalculatorEnvironment

    def reset(self, row: Row) -> str:
        """There is no first observation."""
        return ""

    def step(self, action: str) -> Step:
        """The value of what is called; a turn without a call is the last one."""
        called = self.spec.call(action)
        if called is None:
            return Step(done=True)
        try:
            answer = written(evaluate(called))
        except CalculatorError as error:
            answer = f"error: {error}"
        return Step(self.spec.observation(answer))


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, brackets and + - * / // % **; raises CalculatorError."""
    if len(expression) > MOST_CHARACTERS:
        raise CalculatorError(f"longer than {MOST_CHARACTERS} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise error if isinstance(error, CalculatorError) else CalculatorError("not arithmetic") from None
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None


def written(value: Fraction) -> str:
    """A value as people write it: whole, as a decimal where that ends, else as a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest, places = rest // (10 if rest % 10 == 0 else 2 if rest % 2 == 0 else 5), places + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    scaled = value * 10**places
    digits = str(abs(scaled.numerator)).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}".rstrip("0")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(Fraction(str(number)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
    raise CalculatorError("not arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MOST_POWER:
        raise CalculatorError(f"an exponent that is not whole, or above {MOST_POWER}")
    return _bounded(Fraction(base ** int(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
        raise CalculatorError(f"more than {MOST_DIGITS} digits")
    return value
