"""The closed union of the terms of a reward, and what all terms of a stage answer together."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, StringConstraints, Tag

from recipes.errors import FieldFinding, at
from recipes.problem_codes import Code
from recipes.stages.answers import Input
from recipes.stages.rewards.answers import Exact, MathVerify, Number
from recipes.stages.rewards.forms import JsonSchema, Length, RegularExpression, Tags
from recipes.stages.rewards.judge import GenerativeJudge
from recipes.stages.rewards.outside import EntryPointTerm, ModelTerm, PythonTerm, UrlTerm
from recipes.stages.rewards.overlap import F1, Bleu, ChrF, RougeL
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.unit_tests import UnitTests
from recipes.stages.rewards.words import RealWords, Repetition

RewardRule = Annotated[
    Exact
    | Number
    | MathVerify
    | UnitTests
    | F1
    | RougeL
    | ChrF
    | Bleu
    | RegularExpression
    | Tags
    | JsonSchema
    | Length
    | RealWords
    | Repetition,
    Field(discriminator="rule"),
]
"""Rules by their names."""

FORMS: dict[str, type[Term]] = {
    "model": ModelTerm,
    "rule": Term,
    "python": PythonTerm,
    "entry_point": EntryPointTerm,
    "url": UrlTerm,
    "judge": GenerativeJudge,
}
"""The key that says what a term is."""


def _form(value: Any) -> str | None:
    """Which form is written: the one whose distinguishing key is there."""
    if isinstance(value, dict):
        return next((key for key in FORMS if key in value), None)
    return next((key for key, form in FORMS.items() if key != "rule" and isinstance(value, form)), "rule")


RewardTerm = Annotated[
    Annotated[ModelTerm, Tag("model")]
    | Annotated[RewardRule, Tag("rule")]
    | Annotated[PythonTerm, Tag("python")]
    | Annotated[EntryPointTerm, Tag("entry_point")]
    | Annotated[UrlTerm, Tag("url")]
    | Annotated[GenerativeJudge, Tag("judge")],
    Discriminator(
        _form,
        custom_error_type="reward_term",
        custom_error_message="a term of a reward is a mapping with `model: ...` (a reward model), `rule: ...` (a named "
        "rule), `python: module:function`, `entry_point: ...`, `url: ...` or `judge: ...`",
    ),
]

TermName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


def reward_inputs(rewards: Mapping[str, Term]) -> list[Input]:
    """Artifacts that the terms read."""
    return [item for name, term in rewards.items() for item in term.inputs(f"rewards.{name}")]


def carried_columns(rewards: Mapping[str, Term]) -> tuple[str, ...]:
    """Columns of the prompts' rows that the terms read, each once."""
    return tuple(dict.fromkeys(column for term in rewards.values() for column in term.carried))


def weights_of(rewards: Mapping[str, Term]) -> dict[str, float]:
    """The weight of each term by name; a term's further measures have none."""
    found = {name: term.weight for name, term in rewards.items()}
    return found | {f"{name}_{measure}": 0.0 for name, term in rewards.items() for measure in term.measures}


def model_terms(rewards: Mapping[str, Term]) -> dict[str, ModelTerm]:
    """The terms that are reward models."""
    return {name: term for name, term in rewards.items() if isinstance(term, ModelTerm)}


def num_judges(rewards: Mapping[str, Term]) -> int:
    """How many of the terms are language models that the stage opens."""
    return sum(isinstance(term, GenerativeJudge) and not term.is_endpoint for term in rewards.values())


def reward_rules(rewards: Mapping[str, Term]) -> Iterator[FieldFinding]:
    """Several reward models, and terms of which none counts."""
    for name, term in list(model_terms(rewards).items())[1:]:
        message = "a stage has one reward model at most"
        yield at(f"rewards.{name}.model", term.model, Code.CONFLICTING_KEYS, message, "leave the others out")
    if rewards and not any(term.weight for term in rewards.values()):
        yield at("rewards", "", Code.NO_EFFECT, "every weight is 0: there is nothing to learn", "give one a weight")
