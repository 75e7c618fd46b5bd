"""Places of the product that dispatch on the class of a stage, of a model or of a source, or on what stands in for one.

A place that dispatches on a class is a class named in `isinstance` or `issubclass` (or a tuple or union of such classes
that has a name), in a `case X(...)`, in `type(x) is X`, or as a key of a dict. One that dispatches on a family's name
is its string in a comparison, a `case`, a `Literal` or a tuple, list or set, or as a key of a dict; kinds of artifacts
that have a family's name count too. A line counts once for each class or name. Declaring a name, as
`family: Literal["vae"]` in its class does, is no dispatch.

What stands in for a class or a name counts too, once for each word. That is a word with which something called `kind`,
`role`, ... is compared (`==`, `in`, `case`), and each word of a constant in which such a thing is looked up:

- for a stage's class its `kind`, and what the rows of its sources are read for (`Role`);
- for a family's name the kind of a model or of an artifact, what its rows are read for (`tuning_role`), and a
  `model_type`;
- for a source's class its name.

Two things do not count. `TABLES` has the tables that are the one place where it is said what a word means: whoever has
a word looks the answer up there. `OUTSIDE` has the modules that read the words of other systems, of whose stages and
models there are no objects yet; `outside=True` lists theirs. What a policy's networks are for (actor, critic) follows
from no stage and no family.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from benchmarks.product_source import MARKS, Site, Tree, is_literal_field, name_of, strings_in

ALIASES = {
    "role": (("recipes.stages.answers", "Role"), ("trainers.data.row_forms", "RowRole")),
    "model kind": (("recipes.models.model_kinds", "ModelKind"),),
    "artifact kind": (("recipes.artifact_kinds", "OutputKind"), ("recipes.artifact_kinds", "ArtifactKind")),
}
"""Vocabularies, and the types whose `Literal`s have their words."""
STAND_INS = {
    "stage classes": (("kind", "kind"), ("role", "role")),
    "family names": (
        ("kind", "artifact kind"),
        ("wants", "artifact kind"),
        ("", "model kind"),
        ("tuning_role", "role"),
        ("model_type", "any"),
    ),
    "source classes": (("source", "source"),),
}
"""What is dispatched on: how that is called which is compared (empty: anything), and the vocabulary of the words."""
TABLES = (
    ("recipes.models.model_kinds", "MODEL_KINDS"),  # what a model of each kind of class is
    ("recipes.models.families", "NOUNS"),  # what messages call an artifact of each kind
    ("recipes.models.families", "HOLDERS"),  # which artifacts hold an output of each kind
    ("recipes.stages.kinds", "SEMANTICS"),  # the version of each kind's mathematics
    ("recipes.stages.answers", "ROLES"),  # what is known of each role
    ("trainers.data.sources.documentation", "ROLE_SETS"),  # what python-docs has for each role
    ("trainers.data.row_forms", "ROW_FORMS"),  # the form of the rows of each role
    ("trainers.models.gguf_export", "_FORMS"),  # how llama.cpp names and lays out a type
    ("trainers.models.tiny", "OWN"),  # the smallest sizes that a type takes
    ("trainers.models.small_vision", "SMALL"),  # the same of types with a vision tower
)
OUTSIDE = ("recipes.convert.", "trainers.inference.describe")
"""Starts of the names of modules that read recipes of other systems, and transformers' lists of classes."""


def class_sites(tree: Tree, classes: set[str]) -> set[Site]:
    """Places that ask which of the classes a value is of."""
    wanted = classes | _aliases(tree, classes)
    return _sites(
        tree, lambda node: ((inner, name) for inner in _class_tests(node) if (name := name_of(inner)) in wanted)
    )


def _aliases(tree: Tree, classes: set[str]) -> set[str]:
    """Names of tuples and unions of the classes."""
    return {
        name_of(node.targets[0])
        for nodes in tree.modules.values()
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple | ast.BinOp)
        and classes & {name_of(inner) for inner in ast.walk(node.value)}
    }


def _class_tests(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, tested]):
            yield from ast.walk(tested)
        case ast.MatchClass(cls=tested):
            yield tested
        case ast.Compare(left=ast.Call(func=ast.Name(id="type")), comparators=[tested]):
            yield from ast.walk(tested)
        case ast.Dict(keys=keys):
            yield from filter(None, keys)


def family_names(tree: Tree) -> set[str]:
    """Names of families: those that classes declare, and that of the one which is opened and never built."""
    return set().union(*tree.declared["family"].values()) | {"vision_language"}


def name_sites(tree: Tree, names: set[str]) -> set[Site]:
    """Places that ask which of the names a value is."""
    return _sites(tree, lambda node: ((inner, name) for inner, name in _name_tests(node) if name in names))


def _name_tests(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Compare(left=left, comparators=others):
            parts: Sequence[ast.AST | None] = (left, *others)
        case ast.MatchValue(value=value):
            parts = (value,)
        case ast.Subscript(value=value, slice=inner) if name_of(value) == "Literal":
            parts = (inner,)
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts) | ast.Dict(keys=parts):
            pass
        case _:
            return
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part, part.value


def _sites(tree: Tree, tested: Callable[[ast.AST], Iterator[tuple[ast.AST, str]]]) -> set[Site]:
    found: set[Site] = set()
    for module, nodes in tree.modules.items():
        declared = {id(inner) for annotation in _declared_in(nodes) for inner in ast.walk(annotation)}
        for node in nodes:
            if id(node) not in declared:
                found |= {Site(module, inner.lineno, name) for inner, name in tested(node)}
    return found


def _declared_in(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """The annotations of fields that declare a kind, a family or a source."""
    for node in nodes:
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            if is_literal_field(item) and item.target.id in MARKS.values():
                yield item.annotation


def stand_in_sites(tree: Tree, what: str, *, outside: bool = False) -> set[Site]:
    """Places that ask for a word that stands in for a class or a name."""
    known = [(ending, _vocabulary(tree, name)) for ending, name in STAND_INS[what]]
    constants = _constants(tree)
    found: set[Site] = set()
    for module, pairs in _all_asked(tree).items():
        if module.startswith(OUTSIDE) != outside:
            continue
        for subject, part in pairs:
            vocabularies = [words for ending, words in known if _is_called(subject, ending)]
            for where, word in _words(constants, module, part) if vocabularies else ():
                if any(words is None or word.value in words for words in vocabularies):
                    found.add(Site(where, word.lineno, str(word.value)))
    return found


def dispatch_sites(tree: Tree, what: str) -> set[Site]:
    """Places that dispatch on what `STAND_INS` names, or on what stands in for it."""
    if what == "family names":
        return name_sites(tree, family_names(tree)) | stand_in_sites(tree, what)
    return class_sites(tree, set(tree.declared[MARKS[what]])) | stand_in_sites(tree, what)


def _vocabulary(tree: Tree, name: str) -> set[str] | None:
    """The words of a vocabulary; None: any."""
    if name == "any":
        return None
    if name in tree.declared:
        return set().union(*tree.declared[name].values())
    aliases = (_assigned(tree, module, alias) for module, alias in ALIASES[name])
    return {word for values in aliases for value in values for word in strings_in(value)}


def _assigned(tree: Tree, module: str, name: str) -> list[ast.expr]:
    """What a module assigns to a name."""
    return [
        node.value
        for node in tree.modules.get(module, ())
        if (isinstance(node, ast.Assign) and name_of(node.targets[0]) == name)
        or (isinstance(node, ast.AnnAssign) and node.value is not None and name_of(node.target) == name)
    ]


@cache
def _all_asked(tree: Tree) -> dict[str, list[tuple[str, ast.AST]]]:
    return {module: [pair for node in nodes for pair in _asked(node)] for module, nodes in tree.modules.items()}


def _asked(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The name of what is compared or looked up, and what it is compared with or looked up in."""
    match node:
        case ast.Compare(left=left, comparators=others):
            parts = (left, *others)
            yield from ((_called(one), other) for one in parts for other in parts if one is not other)
        case ast.Match(subject=subject, cases=cases):
            values = (inner for case in cases for inner in ast.walk(case.pattern) if isinstance(inner, ast.MatchValue))
            yield from ((_called(subject), inner.value) for inner in values)
        case (
            ast.Subscript(value=ast.Name() as table, slice=key)
            | ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="get"), args=[key, *_])
        ):
            yield _called(key), table


def _called(node: ast.AST) -> str:
    """How something is called, in small letters: the last part of a name, or the key by which it is taken."""
    match node:
        case (
            ast.Subscript(value=value, slice=key)
            | ast.Call(func=ast.Attribute(value=value, attr="get"), args=[key, *_])
        ):
            return str(key.value) if isinstance(key, ast.Constant) else name_of(key).lower() or _called(value)
        case ast.Call(func=function):
            return name_of(function).lower()
    return name_of(node).lower()


@cache
def _is_called(name: str, ending: str) -> bool:
    """Whether a name ends so, in the singular or the plural; what a longer ending names is not meant."""
    longer = {other for pairs in STAND_INS.values() for other, _ in pairs if ending and other.endswith(f"_{ending}")}
    endings = (f"_{ending}", f"_{ending}s")
    return not ending or (f"_{name}".endswith(endings) and not any(_is_called(name, other) for other in longer))


Constants = dict[str, list[tuple[str, ast.expr]]]
"""The values of constants with the modules that define them, by name."""


@cache
def _constants(tree: Tree) -> Constants:
    found: Constants = {}
    for module, nodes in tree.modules.items():
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                name = name_of(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                if name.isupper() and (module, name) not in TABLES:
                    found.setdefault(name, []).append((module, node.value))
    return found


def _words(constants: Constants, module: str, node: ast.AST) -> Iterator[tuple[str, ast.Constant]]:
    """The words of a literal, or of a constant where it is defined, with the module that has them."""
    match node:
        case ast.Constant(value=str()):
            yield module, node
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items) | ast.Dict(keys=items):
            for item in filter(None, items):
                yield from _words(constants, module, item.value if isinstance(item, ast.Starred) else item)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            for where, value in constants.get(name, ()):
                yield from _words({}, where, value)
