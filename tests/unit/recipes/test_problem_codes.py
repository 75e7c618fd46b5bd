"""The codes of problems: each is used, none is left out, and their page is up to date."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from recipes.problem_codes import Code, markdown_page

ROOT = Path(__file__).parents[3]
SOURCES = [
    path
    for folder in ("recipes", "trainers", "rlhf", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "problem_codes.py"
]


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            yield name, node


def test_every_code_is_raised() -> None:
    used = {name for path in SOURCES for name in re.findall(r"\bCode\.([A-Z0-9_]+)", path.read_text(encoding="utf-8"))}
    assert {code.name for code in Code} - used == set()


def test_every_problem_has_a_code() -> None:
    """mypy asks for it, too; here also of calls that pass a value of type Any."""
    makers, seen, bare = {"Problem": 0, "Finding": 0, "problem": 0, "refuse": 0, "at": 2}, 0, []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if not re.search(r"^from recipes\.(loaded_recipe|errors|fields) import ", text, re.MULTILINE):
            continue
        for name, call in _calls(ast.parse(text)):
            if len(call.args) > makers.get(name, 99) and f"class {name}:" not in text:
                seen += 1
                code = ast.unparse(call.args[makers[name]])
                if not (code.startswith(("Code.", "_CODES")) or code in ("code", "finding.code", "error.code")):
                    bare.append(f"{path.relative_to(ROOT)}:{call.lineno}: {code}")
    assert seen > 150
    assert bare == []


def test_a_code_is_its_name_in_kebab_case_and_has_a_sentence() -> None:
    for code in Code:
        assert code == code.name.lower().replace("_", "-")
        assert re.fullmatch(r"[A-Z`].{10,100}\.", code.meaning), code
    assert len({code.meaning for code in Code}) == len(Code)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "problems.md").read_text(encoding="utf-8")
    assert page == markdown_page(), "run: python -m recipes.problem_codes docs/problems.md"
