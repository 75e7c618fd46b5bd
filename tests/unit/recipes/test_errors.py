"""The exception tree crosses processes and carries the exit codes."""

import json
import pickle

import pytest

from recipes import errors
from recipes.errors import Problem, RecipeError, TrainwrightError
from recipes.problem_codes import Code


@pytest.mark.parametrize(
    ("name", "code"),
    [("RequestError", 2), ("CapacityError", 3), ("StageError", 4), ("StoreDamaged", 5), ("Preempted", 75)],
)
def test_an_error_survives_pickling(name: str, code: int) -> None:
    error = getattr(errors, name)("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, TrainwrightError)
    assert (type(copy), str(copy), copy.exit_code) == (type(error), "what happened", code)


def test_a_recipe_error_keeps_its_problems() -> None:
    error = RecipeError([Problem(Code.WRONG_TYPE, "a.yaml", 1, "seed", "'x'", "must be a whole number")])
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == error.problems
    assert copy.exit_code == 2
    assert str(copy) == "a.yaml:1: seed: must be a whole number (found 'x') [wrong-type]"
    assert json.loads(json.dumps(copy.problems[0].to_json())) == {
        "code": "wrong-type",
        "file": "a.yaml",
        "line": 1,
        "field": "seed",
        "found": "'x'",
        "message": "must be a whole number",
        "suggestion": "",
    }
