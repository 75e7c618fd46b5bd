"""Functions of other people: from a module of the recipe's folder or of the installation, or an entry point."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from recipes.errors import Finding, RequestError
from recipes.nearest import nearest
from recipes.problem_codes import Code
from recipes.stages.rewards.outside import EntryPointTerm, PythonTerm

GROUP = "trainwright.rewards"
Function = Callable[[list[str], list[dict[str, Any]]], Any]


def function_finding(term: PythonTerm | EntryPointTerm, base_dir: Path) -> Finding | None:
    """Why a term's function cannot be called here; None: it can. A module of the recipe's folder is read, not run."""
    if isinstance(term, PythonTerm):
        return module_finding(term.python, base_dir)
    try:
        load_function(term, base_dir)
    except FunctionError as error:
        return error.finding
    return None


def load_function(term: PythonTerm | EntryPointTerm, base_dir: Path) -> Function:
    """The function of a term; raises RequestError that says why there is none."""
    if isinstance(term, EntryPointTerm):
        return entry_point_function(term.entry_point, GROUP)
    return module_function(term.python, base_dir)


def module_finding(place: str, base_dir: Path) -> Finding | None:
    """Why `module:function` cannot be called here; None: it can. A module of the recipe's folder is read, not run."""
    module, _, name = place.partition(":")
    file = _own_file(module, base_dir)
    if file is not None:
        return _defines(file, name)
    try:
        module_function(place, base_dir)
    except FunctionError as error:
        return error.finding
    return None


def module_function(place: str, base_dir: Path) -> Callable[..., Any]:
    """What `module:function` means; raises RequestError that says why there is none."""
    module_name, _, name = place.partition(":")
    file = _own_file(module_name, base_dir)
    with _importing(f"module {module_name}", base_dir):
        module = importlib.import_module(module_name) if file is None else _run_file(file)
    return _callable(getattr(module, name, None), f"function {name} in module {module_name}")


class FunctionError(RequestError):
    """A function that is not there; carries what `check` reports."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding

    def __str__(self) -> str:
        return str(self.finding)


def _own_file(module: str, base_dir: Path) -> Path | None:
    file = base_dir / f"{module.replace('.', '/')}.py"
    return file if file.is_file() else None


def _run_file(file: Path) -> Any:
    """The module of a file, by a name of its own: two recipes' folders may have modules of one name."""
    name = f"_reward_{sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def entry_point_function(name: str, group: str) -> Callable[..., Any]:
    """What an installed package has under a name in a group; raises RequestError that says why there is none."""
    there = {point.name: point for point in entry_points(group=group)}
    if name not in there:
        guess = nearest(name, list(there))
        known = f"did you mean {guess}?" if guess else "installed: " + (", ".join(sorted(there)) or "none")
        message = f"no installed package has the entry point {name!r} in the group {group}"
        raise FunctionError(Finding(Code.MISSING_REWARD_FUNCTION, message, known))
    with _importing(f"entry point {name} ({there[name].value})"):
        return _callable(there[name].load(), f"entry point {name}")


def _callable(found: Any, what: str) -> Callable[..., Any]:
    if not callable(found):
        message = f"there is no {what}" if found is None else f"{what} is {type(found).__name__}, not a function"
        raise FunctionError(Finding(Code.MISSING_REWARD_FUNCTION, message))
    function: Callable[..., Any] = found
    return function


@contextmanager
def _importing(what: str, folder: Path | None = None) -> Iterator[None]:
    """Say of any exception in code that is imported whose it was; modules of the folder are found meanwhile."""
    before = [*sys.path]
    if folder is not None:
        sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    except Exception as error:
        message = f"{what} cannot be imported: {type(error).__name__}: {error}"
        advice = "install it where training runs, or put the module into the recipe's folder"
        raise FunctionError(Finding(Code.MISSING_REWARD_FUNCTION, message, advice)) from error
    finally:
        sys.path[:] = before


def _defines(file: Path, name: str) -> Finding | None:
    """The rule that the source of a module defines a name."""
    try:
        body = ast.parse(file.read_bytes(), str(file)).body
    except (SyntaxError, ValueError) as error:
        return Finding(Code.MISSING_REWARD_FUNCTION, f"{file} is no Python: {error}")
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
              if isinstance(target, ast.Name)]  # fmt: skip
    names += [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    if name in names or "*" in names:
        return None
    guess = nearest(name, names)
    return Finding(
        Code.MISSING_REWARD_FUNCTION, f"{file} has no function {name}", f"did you mean {guess}?" if guess else ""
    )
