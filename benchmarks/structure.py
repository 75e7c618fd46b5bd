"""How many places of the product know which kinds of stage, families and sources there are; rules worded twice; import
circles.

Usage: python -m benchmarks.structure [--sites], which reads the source and imports nothing; `--sites` lists the places.

`benchmarks/dispatch.py` says what counts as a place.
"""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.dispatch import STAND_INS, class_sites, dispatch_sites, stand_in_sites
from benchmarks.product_source import PACKAGES, ROOT, Site, Tree, name_of, read_tree


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
    guards = (node for node in nodes if isinstance(node, ast.If) and name_of(node.test) == "TYPE_CHECKING")
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
            case ast.Call(func=made, args=given) if is_rule and len(given) > MESSAGES.get(name_of(made), 9):
                text = given[MESSAGES[name_of(made)]]
            case ast.Assign(targets=[ast.Name(id="message")], value=text) if is_rule:
                pass
            case ast.Raise(exc=ast.Call(func=made, args=[text, *_])) if not is_rule and name_of(made) in REFUSALS:
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
    for what in STAND_INS:
        _print_sites(f"dispatch on {what} and what stands in for them", dispatch_sites(tree, what), is_listed)
        outside = stand_in_sites(tree, what, outside=True)
        _print_sites(f"dispatch on words of other systems that stand in for {what}", outside, is_listed)
    _print_sites("dispatch on model classes", class_sites(tree, set(tree.declared["family"])), is_listed)
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
