"""The documentation that a Python installation carries, read from its source files without importing them."""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path
from typing import Literal

EXTRACTOR_VERSION = 3
"""Raised when the same sources give other rows."""

EXCLUDED = frozenset(
    (
        *("test", "tests", "idlelib", "lib2to3", "turtledemo"),
        *("site-packages", "dist-packages", "_bundled", "__pycache__", "pydoc_data"),
    )
)
"""Folders without documentation of the library: tests, programs, other projects."""

TOPICS_FILE = Path("pydoc_data") / "topics.py"

EntryKind = Literal["module", "class", "function", "method", "attribute", "topic"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing."""

    kind: EntryKind
    module: str
    qualname: str
    """Name within the module; empty for a module; the topic's name for a topic."""
    parameters: tuple[str, ...]
    doc: str
    """Docstring without indentation, or the topic's text."""

    @property
    def name(self) -> str:
        """Return the dotted name."""
        return f"{self.module}.{self.qualname}" if self.qualname else self.module


def library_folder() -> Path:
    """Return the folder of the standard library's Python files."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(library: Path) -> list[Path]:
    """Return the documented files relative to the folder, in an order that no file system or locale changes."""
    found: list[Path] = []
    for folder, names, files in os.walk(library):
        relative = Path(folder).relative_to(library)
        names[:] = [name for name in names if name not in EXCLUDED and not name.startswith(("config-", "."))]
        found += [
            relative / name for name in files if name.endswith(".py") and not name.startswith(("_sysconfigdata", "."))
        ]
    if (library / TOPICS_FILE).is_file():
        found.append(TOPICS_FILE)
    return sorted(found, key=lambda path: path.parts)


@lru_cache(maxsize=4)
def python_docs_digest(library: Path | None = None) -> str:
    """Return 64 hex digits over the documented files and the extractor's version."""
    library = library or library_folder()
    digest = hashlib.sha256(f"python-docs {EXTRACTOR_VERSION}\n".encode())
    for path in source_files(library):
        content = (library / path).read_bytes()
        digest.update(f"{path.as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def read_entries(library: Path | None = None) -> list[Entry]:
    """Return every documented module, class, function, method and attribute, then the language reference's topics."""
    library = library or library_folder()
    entries: list[Entry] = []
    topics: list[Entry] = []
    for path in source_files(library):
        tree = _parse((library / path).read_bytes())
        if tree is None:
            continue
        if path == TOPICS_FILE:
            topics = _topics(tree)
        else:
            entries += _definitions(tree, _module_name(path))
    return entries + topics


def read_module(name: str) -> list[Entry]:
    """Return what one module of the standard library documents."""
    tree = _parse((library_folder() / f"{name}.py").read_bytes())
    return [] if tree is None else list(_definitions(tree, name))


def _parse(source: bytes) -> ast.Module | None:
    """Parse; None for a file that is not of this Python version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _topics(tree: ast.Module) -> list[Entry]:
    """Read the `topics` dictionary, whether it is an assignment or an annotated one."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(
            isinstance(target, ast.Name) and target.id == "topics" for target in targets
        ):
            try:
                table = ast.literal_eval(node.value) if node.value is not None else {}
            except ValueError:
                return []
            if isinstance(table, dict):
                return [
                    Entry("topic", "topics", name, (), text)
                    for name, text in sorted(table.items())
                    if isinstance(name, str) and isinstance(text, str)
                ]
    return []


def _definitions(tree: ast.Module, module: str) -> Iterator[Entry]:
    """Yield the module's documented definitions in source order, the first of each name; nested ones included."""
    doc = _docstring(tree)
    if doc:
        yield Entry("module", module, "", (), doc)
    seen: set[str] = set()
    for entry in _walk(tree, module, "", in_class=False):
        if entry.qualname not in seen:
            seen.add(entry.qualname)
            yield entry


def _walk(node: ast.AST, module: str, prefix: str, *, in_class: bool) -> Iterator[Entry]:
    """Walk statements only, which is several times faster than `ast.walk`."""
    for child in _statements(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_class = isinstance(child, ast.ClassDef)
            doc = _docstring(child)
            if doc:
                yield _entry(child, module, prefix + child.name, doc, in_class=in_class)
            yield from _walk(child, module, f"{prefix}{child.name}.", in_class=is_class)
        else:
            yield from _walk(child, module, prefix, in_class=in_class)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        yield from getattr(node, field, ())


def _entry(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, module: str, qualname: str, doc: str, *, in_class: bool
) -> Entry:
    if isinstance(node, ast.ClassDef):
        return Entry("class", module, qualname, (), doc)
    decorators = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "getter"}:
        return Entry("attribute", module, qualname, (), doc)
    parameters = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
    if in_class and parameters and "staticmethod" not in decorators:
        del parameters[0]
    parameters += [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    parameters += [argument.arg for argument in node.args.kwonlyargs]
    parameters += [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
    return Entry("method" if in_class else "function", module, qualname, tuple(parameters), doc)


def _docstring(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return cleandoc(first.value.value).strip()
    return ""
