"""How many places of the product know which kinds of stage, families and sources there are; rules worded twice; import
circles.

Usage: python -m benchmarks.structure [--sites], which reads the source and imports nothing; `--sites` lists the places.

A place that dispatches on a class is a class named in `isinstance` or `issubclass` (or a tuple or union of such classes
that has a name), in a `case X(...)`, in `type(x) is X`, or as a key of a dict. One that dispatches on a family's name
is its string in a comparison, a `case`, a `Literal` or a tuple, list or set, or as a key of a dict; kinds of artifacts
that have a family's name count too. A line counts once for each class or name. Declaring a name, as
`family: Literal["vae"]` in its class does, is no dispatch.
"""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipes", "cluster", "trainers", "rlhf", "launch")
MARKS = {"stage classes": "kind", "model classes": "family", "source classes": "source"}
"""What is dispatched on, and the field by whose `Literal` its classes are known."""


@dataclass
class Tree:
    """The product's modules, parsed, by dotted name."""

    modules: dict[str, list[ast.AST]]
    """Every node of each."""
    paths: dict[str, Path]
    declared: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    """Mark -> class -> the names that its field takes."""


@dataclass(frozen=True)
class Site:
    """A place that dispatches on a class or a name."""

    module: str
    line: int
    name: str


def read_tree(root: Path = ROOT, packages: Sequence[str] = PACKAGES) -> Tree:
    """Parse every module of the packages."""
    modules, paths = {}, {}
    for path in sorted(file for package in packages for file in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        paths[name] = path
    tree = Tree(modules, paths)
    for mark in MARKS.values():
        tree.declared[mark] = dict(_declarations(tree, mark))
    return tree


def _declarations(tree: Tree, mark: str) -> Iterator[tuple[str, set[str]]]:
    """Classes of `recipes` whose field `mark` is a Literal; a stage's own `family` makes it no model."""
    for name, nodes in tree.modules.items():
        for node in nodes if name.startswith("recipes") else ():
            if isinstance(node, ast.ClassDef):
                fields = {item.target.id: item for item in node.body if _is_literal_field(item)}
                if mark in fields and (mark == "kind" or "kind" not in fields):
                    yield node.name, set(_strings(fields[mark].annotation))


def _is_literal_field(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.annotation, ast.Subscript)
        and _name(node.annotation.value) == "Literal"
    )


def _name(node: ast.AST) -> str:
    """The last part of a dotted name; empty for anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _strings(node: ast.AST) -> Iterator[str]:
    return (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str))


def class_sites(tree: Tree, classes: set[str]) -> set[Site]:
    """Places that ask which of the classes a value is of."""
    wanted = classes | _aliases(tree, classes)
    return _sites(
        tree, lambda node: ((inner, name) for inner in _class_tests(node) if (name := _name(inner)) in wanted)
    )


def _aliases(tree: Tree, classes: set[str]) -> set[str]:
    """Names of tuples and unions of the classes."""
    return {
        _name(node.targets[0])
        for nodes in tree.modules.values()
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple | ast.BinOp)
        and classes & {_name(inner) for inner in ast.walk(node.value)}
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
        case ast.Subscript(value=value, slice=inner) if _name(value) == "Literal":
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
            if _is_literal_field(item) and item.target.id in MARKS.values():
                yield item.annotation


def imports(tree: Tree, module: str, *, for_types: bool = False) -> set[str]:
    """Modules of the tree that a module imports at any depth, in a function too; with `for_types` also those under
    `if TYPE_CHECKING`."""
    found: set[str] = set()
    skipped = set() if for_types else _for_types(tree.modules[module])
    for node in tree.modules[module]:
        if id(node) in skipped:
            continue
        match node:
            case ast.Import(names=names):
                wanted = [alias.name for alias in names]
            case ast.ImportFrom(module=source, names=names, level=level):
                package = module if tree.paths[module].name == "__init__.py" else module.rpartition(".")[0]
                base = package.rsplit(".", level - 1)[0] if level else ""
                origin = ".".join(filter(None, (base, source)))
                submodules = [f"{origin}.{alias.name}" for alias in names]
                is_whole = any(name not in tree.modules for name in submodules)
                wanted = [*submodules, *([origin] if is_whole else [])]
            case _:
                continue
        found |= {name for name in wanted if name in tree.modules}
    return found - {module}


def _for_types(nodes: Sequence[ast.AST]) -> set[int]:
    """The ids of all nodes under `if TYPE_CHECKING`."""
    guards = (node for node in nodes if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING")
    return {id(inner) for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, in the end, every other (Tarjan's strongly connected components)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in numbers:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], numbers[other])
        if lowest[module] == numbers[module]:
            start = stack.index(module)
            members = stack[start:]
            del stack[start:]
            if len(members) > 1:
                found.append(sorted(members))

    for module in sorted(graph):
        if module not in numbers:
            visit(module)
    return sorted(found)


def import_circles(tree: Tree, *, for_types: bool = False) -> list[list[str]]:
    """The tree's circular imports."""
    return circles({module: imports(tree, module, for_types=for_types) for module in tree.modules})


MESSAGES = {"Finding": 1, "refuse": 1, "at": 3, "problem": 3}
"""What makes a finding, and which of its arguments is the message."""
REFUSALS = ("RequestError", "StageError")
COMMON = frozenset({
    "and", "are", "at", "each", "for", "from", "has", "have", "its", "model", "not", "one", "stage", "than", "that",
    "the", "this", "where", "which", "with",
})  # fmt: skip
"""Words that tell no rules apart."""
LIKENESS = 0.8
"""Share of the words of the shorter of two messages from which on they word one rule."""


def twice_worded(tree: Tree) -> list[tuple[Site, Site]]:
    """Refusals of a worker in the words of a rule that `check` has: the rule is written twice.

    A rule in other words is not found, so that 0 does not prove that there is none.
    """
    rules = [
        found for name in tree.modules if name.startswith("recipes") for found in _messages(tree, name, is_rule=True)
    ]
    workers = [name for name in tree.modules if name.startswith(("trainers", "rlhf"))]
    refusals = [found for name in workers for found in _messages(tree, name, is_rule=False)]
    pairs: dict[Site, Site] = {}
    for refusal, said in refusals:
        for rule, words in rules:
            common = len(said & words)
            if common >= 4 and common >= LIKENESS * min(len(said), len(words)):
                pairs.setdefault(refusal, rule)
    return sorted(pairs.items(), key=lambda pair: (pair[0].module, pair[0].line))


def _messages(tree: Tree, module: str, *, is_rule: bool) -> Iterator[tuple[Site, set[str]]]:
    """The words of each message of a rule, or of each refusal that is no rule's finding."""
    for node in tree.modules[module]:
        match node:
            case ast.Call(func=made, args=given) if is_rule and len(given) > MESSAGES.get(_name(made), 9):
                text = given[MESSAGES[_name(made)]]
            case ast.Assign(targets=[ast.Name(id="message")], value=text) if is_rule:
                pass
            case ast.Raise(exc=ast.Call(func=made, args=[text, *_])) if not is_rule and _name(made) in REFUSALS:
                pass
            case _:
                continue
        words = set(re.findall(r"[a-z_]{3,}", " ".join(_literals(text)).lower())) - COMMON
        if len(words) >= 4:
            yield Site(module, node.lineno, ""), words


def _literals(text: ast.AST) -> Iterator[str]:
    """The literal parts of a text, but for what is put into it."""
    match text:
        case ast.Constant(value=str() as value):
            yield value
        case ast.JoinedStr(values=parts):
            yield from (part.value for part in parts if isinstance(part, ast.Constant))
        case ast.BinOp(left=left, right=right):
            yield from _literals(left)
            yield from _literals(right)


def _print_sites(title: str, sites: set[Site], is_listed: bool) -> None:
    files = Counter(site.module for site in sites)
    print(f"{title}: {len(sites)} in {len(files)} files")
    for module, count in files.most_common() if is_listed else ():
        lines = sorted((site.line, site.name) for site in sites if site.module == module)
        print(f"  {module} {count}: {', '.join(f'{line} {name}' for line, name in lines)}")


def _print_sizes(tree: Tree) -> None:
    files = Counter(path.parent for path in tree.paths.values() if path.name != "__init__.py")
    for package in PACKAGES:
        own = [path for path in tree.paths.values() if path.is_relative_to(ROOT / package)]
        folders = [(folder, count) for folder, count in sorted(files.items()) if folder.is_relative_to(ROOT / package)]
        flat = ", ".join(f"{count} in {folder.relative_to(ROOT).as_posix()}" for folder, count in folders)
        print(f"{package}: {sum(map(_num_lines, own))} lines; files: {flat}")
    print(f"product: {sum(map(_num_lines, tree.paths.values()))} lines")


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", action="store_true", help="list every place")
    is_listed = parser.parse_args().sites
    tree = read_tree()
    for title, mark in MARKS.items():
        _print_sites(f"dispatch on {title}", class_sites(tree, set(tree.declared[mark])), is_listed)
    _print_sites("dispatch on family names", name_sites(tree, family_names(tree)), is_listed)
    pairs = twice_worded(tree)
    print(f"refusals of workers in the words of a rule of check: {len(pairs)}")
    for refusal, rule in pairs:
        print(f"  {refusal.module}:{refusal.line} {rule.module}:{rule.line}")
    for title, for_types in (("lazy ones too", False), ("those for types too", True)):
        found = import_circles(tree, for_types=for_types)
        print(f"circular imports, {title}: {len(found)}")
        for circle in found:
            print(f"  {' '.join(circle)}")
    _print_sizes(tree)


if __name__ == "__main__":
    main()
