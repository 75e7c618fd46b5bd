"""Tests tell errors apart by class, code, field, file or value: no `match=` pins a sentence of a message."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
MOST_WORDS = 3
"""Lower-case words in a row: more of them are a sentence."""
WORD = re.compile(r"[a-z]+(-[a-z]+)*[,;:.]?")


def pinned_sentences(source: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of the `match=` that have more than a few lower-case words in a row.

    Where `match=` is given a parameter of the test, or a name in a loop or of the module, its values count.
    """
    tree = ast.parse(source)
    named = dict(_parameters(tree))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for given in (keyword.value for keyword in call.keywords if keyword.arg == "match"):
            values = named.get(given.id, []) if isinstance(given, ast.Name) else [given]
            yield from ((text.lineno, found) for text in values if num_words(found := _text(text)) > MOST_WORDS)


def num_words(text: str) -> int:
    """The longest row of lower-case words."""
    longest = row = 0
    for token in text.replace("\\", "").split():
        row = row + 1 if WORD.fullmatch(token) else 0
        longest = max(longest, row)
    return longest


def _parameters(tree: ast.Module) -> Iterator[tuple[str, list[ast.expr]]]:
    """The values of every parameter of a test."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize" and len(call.args) > 1:
            names = [part.strip() for part in ",".join(_strings(call.args[0])).split(",")]
            rows = call.args[1].elts if isinstance(call.args[1], ast.List | ast.Tuple) else []
            for place, name in enumerate(names):
                cells = [_cell(row, place, len(names)) for row in rows]
                yield name, [cell for cell in cells if cell is not None]


def _cell(row: ast.expr, place: int, width: int) -> ast.expr | None:
    if width == 1:
        return row
    return row.elts[place] if isinstance(row, ast.Tuple) and place < len(row.elts) else None


def _strings(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _text(node: ast.expr) -> str:
    """The literal parts of a text; what is put into it is no word."""
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.JoinedStr(values=parts):
            return " ".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.BinOp(left=left, right=right):
            return _text(left) + _text(right)
    return ""


def test_no_match_pins_a_sentence() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text!r}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, text in pinned_sentences(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "match the code, the field, the file or the value instead"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("pytest.raises(E, match='the data has no rows')", [1]),
        ("pytest.raises(E, match=f'{x} is none of the kinds')", [1]),
        ("pytest.raises(E, match=r'rows\\.jsonl:2: no column')", []),
        ("pytest.raises(E, match='no rows')", []),
        ("@pytest.mark.parametrize(('a', 'said'), [\n(1, 'x'),\n(2, 'it is not so, friend')])\n"
         "def test(said):\n    pytest.raises(E, match=said)", [3]),
    ],
)  # fmt: skip
def test_a_sentence_is_found(source: str, lines: list[int]) -> None:
    assert [line for line, _ in pinned_sentences(source)] == lines
