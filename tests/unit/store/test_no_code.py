"""Nothing that is loaded can be code: no pickle, no torch.load, no archives, on any path of the packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("recipes", "trainers", "rlhf", "launch", "cluster")
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "tarfile",
    "zipfile",
}  # fmt: skip
FORBIDDEN_CALLS = {
    ("torch", "load"), ("np", "load"), ("numpy", "load"), ("pickle", "load"), ("pickle", "loads"),
    ("shutil", "unpack_archive"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("pd", "read_pickle"), ("os", "system"),
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "__import__"}
UNPACKING = {"extract", "extractall"}
LISTS_NAMES = {"recipes/picture_files.py": "zipfile"}
"""Looks up which arrays an .npz holds; unpacks nothing."""


def findings(source: str) -> Iterator[str]:
    """Say what a source file uses of what is forbidden; np.load(..., allow_pickle=False) is allowed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FORBIDDEN_MODULES:
            yield f"line {node.lineno}: from {node.module}"
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN_NAMES:
                yield f"line {node.lineno}: {called.id}()"
            if isinstance(called, ast.Attribute) and called.attr in UNPACKING:
                yield f"line {node.lineno}: {called.attr}()"
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                pair = (called.value.id, called.attr)
                refuses = any(
                    word.arg == "allow_pickle" and isinstance(word.value, ast.Constant) and word.value.value is False
                    for word in node.keywords
                )
                is_safe_array = pair in {("np", "load"), ("numpy", "load")} and refuses
                if pair in FORBIDDEN_CALLS and not is_safe_array:
                    yield f"line {node.lineno}: {'.'.join(pair)}()"
            for word in node.keywords:
                is_true = not (isinstance(word.value, ast.Constant) and word.value.value is False)
                if word.arg in ("trust_remote_code", "allow_pickle") and is_true:
                    yield f"line {node.lineno}: {word.arg}"
                if word.arg == "weights_only" and not is_true:
                    yield f"line {node.lineno}: weights_only=False"


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_load_path_can_run_code(path: Path) -> None:
    allowed = LISTS_NAMES.get(path.relative_to(ROOT).as_posix())
    assert [found for found in findings(path.read_text()) if not found.endswith(f": import {allowed}")] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import tarfile as t", "torch.load('x')", "np.load('x')",
        "np.load('x', allow_pickle=True)", "shutil.unpack_archive('x')", "eval('1')", "yaml.load(x, Loader=L)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)", "f(weights_only=False)",
        "import torch\nimport zipfile",
    ],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert list(findings(source))


def test_the_search_spares() -> None:
    assert list(findings("np.load('x', allow_pickle=False, mmap_mode='r')\nsafe_open('x')\njson.loads('1')")) == []
    assert len(FILES) > 20
