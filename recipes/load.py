"""From YAML files to a validated recipe: `extends`, command-line settings, and every error at once with its place."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from recipes.errors import Problem, RecipeError
from recipes.locate import field_at, key_elsewhere, model_keys, nearest, path_of, slot_at
from recipes.recipe import Cluster, Recipe
from recipes.smoke import shrink
from recipes.stages import Stage
from recipes.yaml_text import MAX_BYTES, Document, Mark, Path, parse_yaml, path_text, shorten

MAX_EXTENDS = 8


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with what is needed to talk about it: its file, its plain data and the place of every value."""

    recipe: Recipe
    path: FilePath
    sources: dict[Path, Mark]
    raw: dict[str, Any]
    smoke: bool = False
    unsound: frozenset[str] = field(default_factory=frozenset)
    """Stages that have errors of their own (only while errors are being collected)."""

    @property
    def base_dir(self) -> FilePath:
        """The folder at which the recipe's relative paths start."""
        return self.path.parent

    def problem(self, path: str | Path, found: Any, message: str, suggestion: str = "") -> Problem:
        """A problem at a field path, with the file and line of that field or of the nearest one around it."""
        parts: Path = tuple(_index(part) for part in path.split(".")) if isinstance(path, str) else path
        mark = _mark_of(parts, self.sources, self.path)
        return Problem(
            mark.file, mark.line, path_text(parts), "" if found == "" else _shown(found), message, suggestion
        )


def load_recipe(path: str | FilePath, overrides: Iterable[str] = (), smoke: bool = False) -> LoadedRecipe:
    """Read, merge and validate a recipe; raises RecipeError with everything that is wrong, static checks included."""
    from recipes.check import check_static

    path = FilePath(path)
    document = _read_layers(path)
    for override in overrides:
        _apply_override(document, override)
    loaded, problems = _validate(document, path)
    if loaded is not None and problems:
        reported = {problem.field for problem in problems}
        problems += [problem for problem in check_static(loaded) if problem.field not in reported]
    if problems or loaded is None:
        raise RecipeError(sorted(problems, key=lambda problem: (problem.file != str(path), problem.line or 0)))
    return replace(loaded, recipe=shrink(loaded.recipe), smoke=True) if smoke else loaded


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """Validate a resolved recipe (`dump_recipe`'s form); raises RecipeError."""
    try:
        return Recipe.model_validate_json(json.dumps(data), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        document = Document(data, {(): Mark("resolved recipe", None)})
        raise RecipeError(_schema_problems(error, document, FilePath("resolved recipe"))) from None


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default written out, as JSON data that `parse_recipe` reads."""
    return recipe.model_dump(mode="json", by_alias=True)


def _read_layers(path: FilePath) -> Document:
    """The recipe's data merged over that of the recipes it extends."""
    layers: list[Document] = []
    seen: list[FilePath] = []
    current, named_by = path, None
    while True:
        document = _read_file(current, named_by)
        seen.append(current.resolve())
        layers.append(document)
        if not isinstance(document.value, dict):
            problem = Problem(str(current), 1, "", shorten(document.value), "a recipe is a mapping of keys to values")
            raise RecipeError([*document.problems, problem])
        if "extends" not in document.value:
            break
        parent = document.value.pop("extends")
        mark = document.marks[("extends",)]
        named_by = Problem(mark.file, mark.line, "extends", shorten(parent), "")
        if not isinstance(parent, str) or parent.startswith("~") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", parent):
            raise RecipeError([*document.problems, replace(named_by, message="expected the path of one recipe file")])
        current = current.parent / parent
        if current.resolve() in seen:
            raise RecipeError([replace(named_by, message="the recipes extend each other in a circle")])
        if len(layers) >= MAX_EXTENDS:
            raise RecipeError([replace(named_by, message=f"at most {MAX_EXTENDS} recipes can extend each other")])
    merged = layers.pop()
    while layers:
        merged = _merge_documents(merged, layers.pop())
    return merged


def _read_file(path: FilePath, named_by: Problem | None) -> Document:
    try:
        if not path.is_file():
            message = "is a folder, not a recipe file" if path.is_dir() else "no such recipe file"
            raise RecipeError([_file_problem(path, named_by, message)])
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([_file_problem(path, named_by, f"cannot be read: {error.strerror}")]) from None
    return parse_yaml(data, str(path))


def _file_problem(path: FilePath, named_by: Problem | None, message: str) -> Problem:
    if named_by is None:
        return Problem(str(path), None, "", "", message)
    return replace(named_by, message=f"{path}: {message}")


def _merge_documents(base: Document, over: Document) -> Document:
    """`over` laid on `base`: mappings merge, everything else is replaced whole."""
    marks = dict(base.marks)

    def adopt(path: Path) -> None:
        for known in [known for known in marks if known[: len(path)] == path]:
            del marks[known]
        marks.update({known: mark for known, mark in over.marks.items() if known[: len(path)] == path})

    def merge(low: dict[str, Any], high: dict[str, Any], path: Path) -> dict[str, Any]:
        merged = dict(low)
        for key, value in high.items():
            here = (*path, key)
            before = merged.get(key)
            if isinstance(value, dict) and isinstance(before, dict) and not _other_variant(here, before, value):
                marks[here] = over.marks[here]
                merged[key] = merge(before, value, here)
            else:
                adopt(here)
                merged[key] = value
        return merged

    def _other_variant(path: Path, before: dict[str, Any], value: dict[str, Any]) -> bool:
        """Whether the two mappings are different members of a tagged union, so that their keys do not mix."""
        slot = slot_at(path, over.value) or slot_at(path, base.value)
        if slot is None or not slot.is_union:
            return False
        if slot.discriminator == "":
            return bool(value.keys() & slot.models) and not (before.keys() & value.keys() & slot.models.keys())
        tag = slot.discriminator
        return tag in value and tag in before and value[tag] != before[tag]

    value = merge(base.value, over.value, ())
    marks[()] = over.marks[()]
    return Document(value, marks, [*base.problems, *over.problems])


def _apply_override(document: Document, override: str) -> None:
    """Set one value from the command line: `stages.base.train.tokens=10_000_000`."""
    source = f"--set {override}"
    dotted, equals, text = override.partition("=")
    path: Path = tuple(_index(part) for part in dotted.strip().split("."))
    if not equals or "" in path:
        document.problems.append(
            Problem(source, None, "", "", "expected PATH=VALUE", "for example stages.base.train.steps=100")
        )
        return
    try:
        value = parse_yaml(text if text.strip() else "null", source, marked=False)
    except RecipeError as error:
        document.problems.extend(replace(problem, field=dotted) for problem in error.problems)
        return
    document.problems.extend(replace(problem, field=dotted) for problem in value.problems)
    node = document.value
    for depth, part in enumerate(path):
        is_last = depth == len(path) - 1
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            pass
        elif isinstance(node, dict):
            part = str(part)
            if not is_last and not isinstance(node.get(part), dict | list):
                node[part] = {}
                document.marks[(*path[:depth], part)] = Mark(source, None)
        else:
            found = f"a list of {len(node)}" if isinstance(node, list) else shorten(node)
            document.problems.append(
                Problem(source, None, dotted, found, f"{path_text(path[: depth + 1])}: no such place")
            )
            return
        if is_last:
            node[part] = value.value
        else:
            node = node[part]
    target = tuple(path)
    for known in [known for known in document.marks if known[: len(target)] == target]:
        del document.marks[known]
    document.marks.update({(*target, *inner): mark for inner, mark in value.marks.items()})


def _validate(document: Document, path: FilePath) -> tuple[LoadedRecipe | None, list[Problem]]:
    """The validated recipe and the problems found; with problems, the recipe holds the stages that are sound."""
    problems = list(document.problems)
    raw = document.value
    try:
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True, by_alias=True, by_name=False)
        return LoadedRecipe(recipe, path, document.marks, raw), problems
    except ValidationError as error:
        found = _schema_problems(error, document, path)
        found += _hidden_problems(error, document, path)
    reported = {problem.field for problem in problems}
    problems += [problem for problem in found if problem.field not in reported]
    stages = raw.get("stages")
    if not isinstance(stages, dict):
        return None, problems
    sound = {name: stage for name, value in stages.items() if (stage := _sound_stage(value)) is not None}
    seed = raw.get("seed")
    partial = Recipe.model_construct(
        name="partial", seed=seed if isinstance(seed, int) else 0, cluster=_sound_cluster(raw), stages=sound
    )
    unsound = frozenset(name for name in stages if name not in sound)
    return LoadedRecipe(partial, path, document.marks, raw, unsound=unsound), problems


_STAGE: TypeAdapter[Stage] = TypeAdapter(Stage)


def _sound_stage(value: Any) -> Stage | None:
    try:
        return _STAGE.validate_json(json.dumps(value), strict=True, by_alias=True, by_name=False)
    except ValidationError:
        return None


def _sound_cluster(raw: dict[str, Any]) -> Cluster:
    try:
        return Cluster.model_validate_json(json.dumps(raw.get("cluster", {})), strict=True)
    except ValidationError:
        return Cluster()


def _hidden_problems(error: ValidationError, document: Document, path: FilePath) -> list[Problem]:
    """What only shows once the errors already found are out of the way (checks between fields of one model)."""
    raw = json.loads(json.dumps(document.value))
    removed: list[Path] = []
    for detail in error.errors(include_url=False):
        place = path_of(detail["loc"])
        parent = _at(raw, place[:-1]) if place else None
        if isinstance(parent, dict) and place[-1] in parent:
            del parent[str(place[-1])]
            if detail["type"] != "extra_forbidden":
                removed.append(place)
    try:
        Recipe.model_validate_json(json.dumps(raw), strict=True, by_alias=True, by_name=False)
    except ValidationError as second:
        shown = {path_of(detail["loc"]) for detail in error.errors(include_url=False)}
        return [
            problem
            for detail, problem in _located_problems(second, document, path)
            if detail["type"] == "value_error"
            and (place := path_of(detail["loc"])) not in shown
            and not any(gone[: len(place)] == place for gone in removed)
        ]
    return []


def _schema_problems(error: ValidationError, document: Document, path: FilePath) -> list[Problem]:
    """pydantic's errors as problems, one for each place."""
    by_field: dict[str, Problem] = {}
    for _, problem in _located_problems(error, document, path):
        first = by_field.get(problem.field)
        if first is None:
            by_field[problem.field] = problem
        elif problem.message not in first.message:
            by_field[problem.field] = replace(first, message=f"{first.message}, or {problem.message}")
    return list(by_field.values())


def _located_problems(error: ValidationError, document: Document, path: FilePath) -> list[tuple[ErrorDetails, Problem]]:
    located = []
    for detail in error.errors(include_url=False):
        place = path_of(detail["loc"])
        mark = _mark_of(place, document.marks, path)
        message, suggestion = _explain(detail, place, document.value)
        if detail["type"] == "union_tag_invalid" and "discriminator" in detail.get("ctx", {}):
            place = (*place, detail["ctx"]["discriminator"].strip("'"))
            mark = _mark_of(place, document.marks, path)
        elif detail["type"] == "union_tag_not_found":
            place = (*place, detail["ctx"]["discriminator"].strip("'"))
        found = "" if detail["type"] in ("missing", "union_tag_not_found") else _shown(_at(document.value, place))
        if detail["type"] == "value_error" and isinstance(_at(document.value, place), dict):
            found = ""
        located.append((detail, Problem(mark.file, mark.line, path_text(place), found, message, suggestion)))
    return located


_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "finite_number": "must be finite",
}


def _explain(detail: ErrorDetails, place: Path, raw: Any) -> tuple[str, str]:
    """The message and the suggestion for one of pydantic's errors."""
    kind, context = detail["type"], detail.get("ctx", {})
    info = field_at(place, raw)
    if kind == "extra_forbidden":
        return _explain_unknown(place, raw)
    if kind == "missing":
        return "the key is required", f"{place[-1]}: {info.description}" if info is not None else ""
    if kind == "literal_error":
        slot = slot_at(place, raw)
        choices = [str(choice) for choice in slot.choices] if slot is not None else []
        expected = [word.strip("'") for word in re.split(r", | or ", str(context["expected"]))]
        found = place[-1] if detail["loc"][-1] == "[key]" else detail["input"]
        return _explain_choice(found, choices or expected)
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return _explain_choice(context["tag"], tags)
    if kind == "union_tag_not_found":
        slot = slot_at(place, raw)
        return "the key is required", "one of " + ", ".join(slot.models) if slot is not None else ""
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "string_pattern_mismatch":
        return f"does not match {context['pattern']}", info.description or "" if info is not None else ""
    if kind in _TYPES:
        suggestion = info.description or "" if info is not None else ""
        if kind in ("int_type", "float_type", "int_from_float") and isinstance(detail["input"], str):
            number = detail["input"].replace(",", "").replace(" ", "")
            if re.fullmatch(r"[-+]?[0-9_.]+([eE][-+]?[0-9]+)?", number):
                suggestion = f"write {number} without quotes"
        if kind == "bool_type" and str(detail["input"]).lower() in ("yes", "on", "no", "off", "y", "n"):
            suggestion = "write true" if str(detail["input"]).lower() in ("yes", "on", "y") else "write false"
        return _TYPES[kind], suggestion
    message = detail["msg"][0].lower() + detail["msg"][1:]
    message = message.removeprefix("input should be ").removeprefix("input should ").replace(" after validation", "")
    suggestion = info.description or "" if info is not None else ""
    return f"must be {message}" if detail["msg"].startswith("Input should be") else message, suggestion


def _explain_choice(found: Any, choices: list[str]) -> tuple[str, str]:
    guess = nearest(str(found), choices)
    return "must be " + _alternatives(choices), f"did you mean {guess}?" if guess is not None else ""


def _explain_unknown(place: Path, raw: Any) -> tuple[str, str]:
    key = str(place[-1])
    parent = slot_at(place[:-1], raw)
    model = parent.model_for(_at(raw, place[:-1])) if parent is not None else None
    if model is None:
        return "unknown key", ""
    keys = list(model_keys(model))
    guess = nearest(key, keys)
    elsewhere = key_elsewhere(key, model)
    if guess is not None and (elsewhere is None or guess.lower() == key.lower()):
        return "unknown key", f"did you mean {guess}?"
    if elsewhere is not None:
        return "unknown key", f"did you mean {elsewhere}?"
    for depth in range(len(place) - 2, -1, -1):
        around = slot_at(place[:depth], raw)
        outer = around.model_for(_at(raw, place[:depth])) if around is not None else None
        if outer is not None and key in model_keys(outer):
            return "unknown key", f"did you mean {path_text((*place[:depth], key))}?"
        if outer is not None and (elsewhere := key_elsewhere(key, outer)) is not None:
            return "unknown key", f"did you mean {path_text((*place[:depth], elsewhere))}?"
    return "unknown key", "valid here: " + ", ".join(keys)


def _alternatives(choices: Sequence[str]) -> str:
    return (
        choices[0]
        if len(choices) == 1
        else ", ".join(choices[:-1]) + " or " + choices[-1]
        if choices
        else "another value"
    )


def _at(raw: Any, path: Path) -> Any:
    for part in path:
        is_item = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if not is_item and not (isinstance(raw, dict) and part in raw):
            return None
        raw = raw[part]
    return raw


def _mark_of(path: Path, marks: dict[Path, Mark], file: FilePath) -> Mark:
    """The mark of the path, or of the nearest place around it."""
    while path not in marks:
        if not path:
            return Mark(str(file), None)
        path = path[:-1]
    return marks[path]


def _index(part: str) -> int | str:
    return int(part) if re.fullmatch(r"0|[1-9][0-9]{0,5}", part) else part


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return shorten(f"'{value}'")
    return shorten(value)
