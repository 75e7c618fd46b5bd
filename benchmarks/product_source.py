"""The product's source, parsed: its modules, and the names that its classes declare."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipes", "cluster", "trainers", "rlhf", "launch")
MARKS = {"stage classes": "kind", "model classes": "family", "source classes": "source"}
"""What is dispatched on, and the field by whose `Literal` its classes are known."""


@dataclass(eq=False)
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
                fields = {item.target.id: item for item in node.body if is_literal_field(item)}
                if mark in fields and (mark == "kind" or "kind" not in fields):
                    yield node.name, set(strings_in(fields[mark].annotation))


def is_literal_field(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.annotation, ast.Subscript)
        and name_of(node.annotation.value) == "Literal"
    )


def name_of(node: ast.AST) -> str:
    """The last part of a dotted name; empty for anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def strings_in(node: ast.AST) -> Iterator[str]:
    return (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str))
