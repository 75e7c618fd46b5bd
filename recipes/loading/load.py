"""From YAML files to a validated recipe: `extends`, command-line settings, and every error at once with its place."""

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path as FilePath
from typing import Annotated, Any, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from recipes.errors import Problem, RecipeError
from recipes.loaded_recipe import LoadedRecipe, UnsoundStage
from recipes.loading.explain import located_problems, schema_problems
from recipes.loading.schema_paths import model_keys, path_of, slot_at
from recipes.loading.spelling import correct_extends, correct_tags
from recipes.loading.yaml_text import MAX_BYTES, Document, parse_yaml
from recipes.nearest import nearest
from recipes.places import Mark, Path, parse_path, path_text, shorten, value_at
from recipes.planning.smoke import shrink
from recipes.problem_codes import Code
from recipes.recipe import Cluster, Recipe
from recipes.rules.static import check_static
from recipes.stages.kinds import Stage

MAX_EXTENDS = 8
Check = Callable[[LoadedRecipe], list[Problem]]
"""Says what is wrong with a recipe whose schema is right."""


def load_recipe(
    path: str | FilePath,
    overrides: Iterable[str] = (),
    smoke: bool = False,
    check_data: Check | None = None,
    forgives: Collection[Code] = (),
) -> LoadedRecipe:
    """Read, merge, validate and check a recipe; raises RecipeError with everything that is wrong.

    With `smoke`, the recipe and its smoke form are both checked, and the smoke form is returned. Data files are looked
    at by `check_data` alone. `forgives`: what a caller can do without.
    """
    path = FilePath(path)
    document = _read_layers(path)
    for override in overrides:
        _apply_override(document, override)
    return _load_document(document, path, smoke, check_data, forgives)


def _load_document(
    document: Document, path: FilePath, smoke: bool, check_data: Check | None, forgives: Collection[Code] = ()
) -> LoadedRecipe:
    checks = [check_static] if check_data is None else [check_static, check_data]
    loaded, problems = _validate(document, path)
    if loaded is not None:
        for check in checks:
            found = [problem for problem in check(loaded) if problem.code not in forgives]
            problems += _further(problems, found)
    if loaded is not None and smoke and not problems:
        loaded = replace(loaded, recipe=shrink(loaded.recipe), smoke=True)
        problems += [problem for check in checks for problem in check(loaded) if problem.code not in forgives]
    if problems or loaded is None:
        raise RecipeError(sorted(problems, key=lambda problem: (problem.file != str(path), problem.line or 0)))
    return loaded


def check_file(
    path: str | FilePath, overrides: Iterable[str] = (), smoke: bool = False, check_data: Check | None = None
) -> tuple[LoadedRecipe | None, list[Problem]]:
    """The loaded recipe and no problems, or None and every problem."""
    try:
        return load_recipe(path, overrides, smoke, check_data), []
    except RecipeError as error:
        return None, error.problems


def check_text(text: str, path: FilePath, check_data: Check | None = None) -> tuple[LoadedRecipe | None, list[Problem]]:
    """`check_file` of a text that is no file yet; relative paths start at the folder of `path`."""
    try:
        return _load_document(parse_yaml(text, str(path)), path, False, check_data), []
    except RecipeError as error:
        return None, error.problems


def _further(problems: list[Problem], found: list[Problem]) -> list[Problem]:
    """What was found at places that have no problem yet."""
    reported = {problem.field for problem in problems}
    return [problem for problem in found if problem.field not in reported]


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """Validate a resolved recipe (`dump_recipe`'s form); raises RecipeError."""
    try:
        return Recipe.model_validate_json(json.dumps(data), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        document = Document(data, {(): Mark("resolved recipe", None)})
        raise RecipeError(schema_problems(error, document, FilePath("resolved recipe"))) from None


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
            problem = Problem(
                Code.WRONG_TYPE, str(current), 1, "", shorten(document.value), "a recipe is a mapping of keys to values"
            )
            by = () if named_by is None else (replace(named_by, message=f"{current} is not a recipe"),)
            raise RecipeError([*document.problems, problem, *by])
        document = layers[-1] = correct_extends(document, current)
        if "extends" not in document.value:
            break
        parent = document.value.pop("extends")
        mark = document.marks[("extends",)]
        named_by = Problem(Code.INVALID_EXTENDS, mark.file, mark.line, "extends", shorten(parent), "")
        if not isinstance(parent, str) or parent.startswith("~") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", parent):
            raise RecipeError([*document.problems, replace(named_by, message="expected the path of one recipe file")])
        current = current.parent / parent
        if current.resolve() in seen:
            message = "recipes extend each other in a cycle"
            raise RecipeError([replace(named_by, code=Code.EXTENDS_CYCLE, message=message)])
        if len(layers) >= MAX_EXTENDS:
            raise RecipeError([replace(named_by, message=f"at most {MAX_EXTENDS} recipes can extend each other")])
    merged = layers.pop()
    while layers:
        merged = _merge_documents(merged, layers.pop())
    return merged


def _read_file(path: FilePath, named_by: Problem | None) -> Document:
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no regular file"
            message = f"is {found}, not a recipe file" if path.exists() else "no such recipe file"
            there = {other.stem: other for other in sorted(path.parent.glob("*.yaml"))}
            guess = None if path.exists() else nearest(path.stem, list(there))
            problem = _file_problem(path, named_by, message)
            raise RecipeError([replace(problem, suggestion="" if guess is None else f"did you mean {there[guess]}?")])
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([_file_problem(path, named_by, f"cannot be read: {error.strerror}")]) from None
    return parse_yaml(data, str(path))


def _file_problem(path: FilePath, named_by: Problem | None, message: str) -> Problem:
    if named_by is None:
        return Problem(Code.RECIPE_NOT_READABLE, str(path), None, "", "", message)
    return replace(named_by, code=Code.RECIPE_NOT_READABLE, message=f"{path}: {message}")


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
        while slot is not None and slot.tag is not None and len(slot.tag.path) < 2:
            if not slot.tag.path:
                return bool(value.keys() & slot.members) and not (before.keys() & value.keys() & slot.members.keys())
            own, other = slot.tag.written(value), slot.tag.written(before)
            if own is not None and other is not None and own != other:
                return True
            slot = slot.member_for(before | value)
        return False

    value = merge(base.value, over.value, ())
    marks[()] = over.marks[()]
    return Document(value, marks, [*base.problems, *over.problems])


def _apply_override(document: Document, override: str) -> None:
    """Set one value from the command line: `stages.base.train.tokens=10_000_000`."""
    source = f"--set {override}"
    dotted, equals, text = override.partition("=")
    path: Path = parse_path(dotted.strip())
    if not equals or "" in path:
        document.problems.append(
            Problem(
                Code.INVALID_OVERRIDE,
                source,
                None,
                "",
                "",
                "expected PATH=VALUE",
                "for example stages.base.train.steps=100",
            )
        )
        return
    try:
        value = parse_yaml(text if text.strip() else "null", source, marked=False)
    except RecipeError as error:
        document.problems.extend(replace(problem, field=dotted) for problem in error.problems)
        return
    document.problems.extend(replace(problem, field=dotted) for problem in value.problems)
    node = document.value
    stages = node.get("stages") if isinstance(node, dict) else None
    is_inside_stage = len(path) > 2 and path[0] == "stages" and path[2] != "kind"
    if is_inside_stage and isinstance(stages, dict) and str(path[1]) not in stages:
        names = [str(name) for name in stages]
        guess = nearest(str(path[1]), names)
        advice = f"did you mean {guess}?" if guess else "there are: " + ", ".join(names)
        document.problems.append(
            Problem(Code.UNKNOWN_STAGE, source, None, dotted, "", f"there is no stage {path[1]}", advice)
        )
        return
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
                Problem(
                    Code.INVALID_OVERRIDE, source, None, dotted, found, f"{path_text(path[: depth + 1])}: no such place"
                )
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
    document, problems = correct_tags(document, path)
    problems = [*document.problems, *problems]
    raw = document.value
    try:
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True, by_alias=True, by_name=False)
        return LoadedRecipe(recipe, path, document.marks, raw), problems
    except ValidationError as invalid:
        error = invalid
        found = schema_problems(error, document, path)
        found += _hidden_problems(error, document, path)
    problems += _further(problems, found)
    stages = raw.get("stages")
    if not isinstance(stages, dict):
        return None, problems
    sound = {name: stage for name, value in stages.items() if (stage := _sound_stage(value)) is not None}
    seed = raw.get("seed")
    partial = Recipe.model_construct(
        name="partial", seed=seed if isinstance(seed, int) else 0, cluster=_sound_cluster(raw), stages=sound
    )
    unsound = {name: _unsound_stage(name, raw, error) for name in stages if name not in sound}
    return LoadedRecipe(partial, path, document.marks, raw, unsound=unsound), problems


@cache
def _any_stage() -> TypeAdapter[Stage]:
    """Validates a stage by itself; only a recipe with mistakes needs it."""
    return TypeAdapter(Stage)


def _sound_stage(value: Any) -> Stage | None:
    try:
        return _any_stage().validate_json(json.dumps(value), strict=True, by_alias=True, by_name=False)
    except ValidationError:
        return None


def _unsound_stage(name: str, raw: dict[str, Any], error: ValidationError) -> UnsoundStage:
    """What of a stage can still be checked: the fields in which no error lies."""
    place = ("stages", name)
    slot, value = slot_at(place, raw), value_at(raw, place)
    model = slot.model_for(value) if slot is not None else None
    if model is None:
        return UnsoundStage(None)
    found = [path_of(detail["loc"]) for detail in error.errors(include_url=False)]
    wrong = {str(path[2]) for path in found if path[:2] == place and len(path) > 2}
    fields: dict[str, Any] = {}
    for key, info in model_keys(model).items():
        if key in value and key not in wrong:
            text = json.dumps(value[key])
            fields[key] = _field_adapter(info).validate_json(text, strict=True, by_alias=True, by_name=False)
    stage = cast(Stage, model.model_construct(**fields))
    return UnsoundStage(stage, frozenset(wrong))


@cache
def _field_adapter(info: FieldInfo) -> TypeAdapter[Any]:
    """Validates a model's field by itself; making one takes longer than all that it validates."""
    form: Any = Annotated[info.annotation, info]
    return TypeAdapter(form)


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
        parent = value_at(raw, place[:-1]) if place else None
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
            for detail, problem in located_problems(second, document, path)
            if detail["type"] == "value_error"
            and (place := path_of(detail["loc"])) not in shown
            and not any(gone[: len(place)] == place for gone in removed)
        ]
    return []
