"""The terms of a reward that read text: opened once, then asked for a number for each response."""

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipes.errors import Finding, RequestError, StageError
from recipes.stages.rewards.answers import MathVerify
from recipes.stages.rewards.judge import GenerativeJudge
from recipes.stages.rewards.outside import EntryPointTerm, ModelTerm, PythonTerm, UrlTerm
from recipes.stages.rewards.term import Row, Rule, Term
from recipes.stages.rewards.unit_tests import UnitTests
from rlhf.rewards.endpoint import ask_endpoint
from rlhf.rewards.functions import Function, function_finding, load_function
from rlhf.rewards.judge import Judge, endpoint_judge
from rlhf.rewards.mathematics import MathProcess, math_finding
from rlhf.sandbox.runner import run_tests, sandbox_finding

Scorer = Callable[[Sequence[str], Sequence[Row]], Sequence[Any]]
"""Values of responses, given the rows of their prompts."""


@dataclass(frozen=True)
class TextTerm:
    """A term that needs nothing but the text of a response and its prompt's row."""

    name: str
    scorer: Scorer
    reads_records: bool = False
    """Whether the scorer gets the prompts' records whole, instead of the columns of their rows."""

    def values(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        """The value of each response to the prompts of these records; raises StageError for anything but numbers."""
        found = self.scorer(texts, records if self.reads_records else [record.get("columns", {}) for record in records])
        if not hasattr(found, "__len__") or len(found) != len(texts):
            count = f"{len(found)} values" if hasattr(found, "__len__") else type(found).__name__
            raise StageError(f"rewards.{self.name}: gave {count} for {len(texts)} responses")
        return [self._number(value, record["id"]) for value, record in zip(found, records, strict=True)]

    def _number(self, value: Any, row: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            raise StageError(f"rewards.{self.name}: gave {value!r} for a response to row {row}, not a finite number")
        return number


def open_text_terms(
    rewards: Mapping[str, Term],
    base_dir: Path,
    records: Sequence[Mapping[str, Any]],
    judges: Mapping[str, Judge] | None = None,
) -> list[TextTerm]:
    """The terms of a stage that are no reward models; `judges` are the language models among them, opened.

    Raises RequestError naming a term that cannot be asked here, or a prompt's row that it cannot read.
    """

    def texts() -> Iterator[str]:
        for record in records:
            yield record["text"]
            yield from filter(None, (record["reference"], *map(_as_text, record.get("columns", {}).values())))

    opened: list[TextTerm] = []
    for name, term in rewards.items():
        for record in records:
            if wrong := term.row_rule(record.get("columns", {})):
                raise RequestError(f"rewards.{name}: row {record['id']}: {wrong}")
        match term:
            case ModelTerm():
                continue
            case Rule():
                opened.append(TextTerm(name, _each(term.scorer(texts))))
            case MathVerify():
                opened.append(TextTerm(name, MathProcess(term).values))
            case UnitTests():
                opened.append(TextTerm(name, _testing(term)))
            case PythonTerm() | EntryPointTerm():
                opened.append(TextTerm(name, _calling(name, load_function(term, base_dir))))
            case GenerativeJudge():
                judge = Judge(term, endpoint_judge(term)) if term.is_endpoint else (judges or {})[name]
                opened.append(TextTerm(name, judge.values, reads_records=True))
                opened += [TextTerm(f"{name}_{each}", _last(judge, each)) for each in term.measures]
            case UrlTerm():
                opened.append(TextTerm(name, partial(ask_endpoint, term)))
            case _:
                raise AssertionError(f"no scorer for {type(term).__name__}")
    return opened


def term_finding(term: Term, base_dir: Path) -> Finding | None:
    """Why a term cannot be asked here; None: it can. Nothing of the recipe's folder is run."""
    match term:
        case MathVerify():
            return math_finding()
        case UnitTests():
            return sandbox_finding()
        case PythonTerm() | EntryPointTerm():
            return function_finding(term, base_dir)
        case _:
            return None


def _as_text(cell: Any) -> str | None:
    return cell if isinstance(cell, str) else None


def _each(value: Callable[[str, Row], float]) -> Scorer:
    return lambda texts, rows: [value(text, row) for text, row in zip(texts, rows, strict=True)]


def _last(judge: Judge, measure: str) -> Scorer:
    """What the judge measured of the texts that it has just judged."""
    return lambda texts, rows: judge.measured(measure)


def _testing(term: UnitTests) -> Scorer:
    """Run tests in a sandbox; raises RequestError that says what this machine lacks for one."""
    if (finding := sandbox_finding()) is not None:
        raise RequestError.of(finding)

    def values(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
        attempts = [term.attempt(text, row) for text, row in zip(texts, rows, strict=True)]
        return [term.worth(found) for found in run_tests(attempts, term.limits, term.parallel)]

    return values


def _calling(name: str, function: Function) -> Scorer:
    """Call a function that is not ours; what it raises is said with its place."""

    def values(texts: Sequence[str], rows: Sequence[Row]) -> Any:
        try:
            return function(list(texts), [dict(row) for row in rows])
        except Exception as error:
            told = "".join(traceback.format_exception(error)[-3:]).strip()
            raise StageError(f"rewards.{name}: the function failed:\n{told}") from error

    return values
