"""The environment of a stage: ours, or one that a module or an installed package makes."""

from functools import partial
from pathlib import Path

from recipes.errors import Finding
from recipes.stages.environments import (
    AnyEnvironment,
    CalculatorEnvironment,
    EntryPointEnvironment,
    PythonDocsEnvironment,
    PythonEnvironment,
)
from rlhf.environments.calculator import Calculator
from rlhf.environments.protocol import MakeEnvironment
from rlhf.environments.python_docs import PythonDocs
from rlhf.rewards.functions import FunctionError, entry_point_function, module_finding, module_function

GROUP = "trainwright.environments"


def open_environment(spec: AnyEnvironment, base_dir: Path) -> MakeEnvironment:
    """What makes the environment of a conversation; raises RequestError that says why there is none."""
    match spec:
        case CalculatorEnvironment():
            return partial(Calculator, spec)
        case PythonDocsEnvironment():
            return partial(PythonDocs, spec)
        case PythonEnvironment(python=place):
            return module_function(place, base_dir)
        case EntryPointEnvironment(entry_point=name):
            return entry_point_function(name, GROUP)
    raise AssertionError(f"nothing makes a {type(spec).__name__}")


def environment_finding(spec: AnyEnvironment, base_dir: Path) -> Finding | None:
    """Why an environment cannot be made here; None: it can. Nothing of the recipe's folder is run."""
    match spec:
        case PythonEnvironment(python=place):
            return module_finding(place, base_dir)
        case EntryPointEnvironment(entry_point=name):
            try:
                entry_point_function(name, GROUP)
            except FunctionError as error:
                return error.finding
    return None
