"""Terms whose values come from elsewhere: functions, entry points, a real HTTP server."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from recipes.errors import RequestError, StageError
from recipes.stages.rewards.union import RewardTerm
from rlhf.rewards.terms import open_text_terms, term_finding
from tests.endpoints import Answer, endpoint, gives

TERM: TypeAdapter[Any] = TypeAdapter(RewardTerm)
RECORDS = [
    {"id": f"rows.jsonl:{row}", "text": "a", "reference": None, "columns": {"answer": row}} for row in range(1, 4)
]
TEXTS = ["x", "yy", "zzz"]

SCORING = """\
import helping

def lengths(texts, rows):
    return [helping.half(len(text)) + row["answer"] for text, row in zip(texts, rows)]

def few(texts, rows):
    return [0.0]

def nothing(texts, rows):
    return [0.0, float("nan"), 1.0]

def words(texts, rows):
    return ["0.5"] * len(texts)

def none(texts, rows):
    return None

def broken(texts, rows):
    return [1 / 0 for _ in texts]

LIMIT = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scoring.py").write_text(SCORING)
    (tmp_path / "helping.py").write_text("def half(n):\n    return n / 2\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "fatal.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\nraise SystemError('boom')\n\ndef f(texts, rows): ...\n"
    )
    return tmp_path


def values(folder: Path, **keys: Any) -> list[float]:
    (term,) = open_text_terms({"own": TERM.validate_python(keys)}, folder, RECORDS)
    return term.values(TEXTS, RECORDS)


def test_a_function_beside_the_recipe_gets_texts_and_rows(folder: Path) -> None:
    assert values(folder, python="scoring:lengths", columns=["answer"]) == [1.5, 3.0, 4.5]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("few", "rewards.own: gave 1 values for 3 responses"),
        ("nothing", r"rewards.own: gave nan for a response to row rows.jsonl:2, not a finite number"),
        ("words", r"rewards.own: gave '0.5' for a response to row rows.jsonl:1"),
        ("none", "rewards.own: gave NoneType for 3 responses"),
        ("broken", r"(?s)rewards.own: the function failed:.*scoring.py.*ZeroDivisionError"),
    ],
)
def test_what_a_function_may_not_give(folder: Path, name: str, says: str) -> None:
    with pytest.raises(StageError, match=says):
        values(folder, python=f"scoring:{name}")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"python": "scoring:lengthz"}, "has no function lengthz; did you mean lengths?"),
        ({"python": "wrong:f"}, "is no Python"),
        ({"python": "no_such_module:f"}, "module no_such_module cannot be imported: ModuleNotFoundError"),
        ({"python": "math:no_such"}, "there is no function no_such in module math"),
        ({"python": "math:pi"}, "function pi in module math is float, not a function"),
        ({"entry_point": "no_such"}, "no installed package has the entry point 'no_such'"),
    ],
)
def test_check_says_which_function_is_not_there(folder: Path, keys: dict[str, str], says: str) -> None:
    finding = term_finding(TERM.validate_python(keys), folder)
    assert finding is not None
    assert finding.code == "missing-reward-function"
    assert says in str(finding)


def test_check_runs_nothing_of_the_recipes_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert term_finding(TERM.validate_python({"python": "fatal:f"}), folder) is None
    assert not (folder / "ran").exists()
    with pytest.raises(RequestError, match=r"module fatal .*: SystemError: boom"):
        values(folder, python="fatal:f")


def test_an_installed_packages_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = folder / "lengthy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lengthy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trainwright.rewards]\nlength = lengthy:length\n")
    (folder / "lengthy.py").write_text("def length(texts, rows):\n    return [len(text) for text in texts]\n")
    monkeypatch.syspath_prepend(str(folder))
    assert values(folder, entry_point="length") == [1, 2, 3]


def lengths(body: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"rewards": [len(text) for text in body["responses"]]}).encode()


def late(body: dict[str, Any]) -> tuple[int, bytes]:
    time.sleep(1.0)
    return lengths(body)


def test_an_endpoint_is_asked_in_batches_and_again_after_its_failures(tmp_path: Path) -> None:
    with endpoint([gives(500, "busy"), gives(429, "slower"), late, lengths]) as (url, asked):
        assert values(tmp_path, url=url, columns=["answer"], batch=2, timeout_s=0.5) == [1, 2, 3]
    assert len(asked) == 5
    assert asked[-1] == {"responses": ["zzz"], "rows": [{"answer": 3}]}


@pytest.mark.parametrize(
    ("answer", "keys", "says", "times"),
    [
        (gives(500, "out of memory"), {"retries": 1}, r"2 attempts \(no repetition is left\).*500.*out of mem", 2),
        (gives(503, ""), {"deadline_s": 0.2}, r"given up after 1 attempts \(the deadline of 0\.2 s\)", 1),
        (gives(404, "no"), {}, "status 404 Not Found: no", 1),
        (gives(200, "<html>"), {}, "JSON .*<html>", 1),
        (gives(200, "[1]"), {}, "no object with `rewards`", 1),
        (gives(200, '{"rewards": [1, 2]}'), {}, "`rewards` is 2 values for 3 responses", 1),
        (gives(200, '{"rewards": 1}'), {}, "`rewards` is int for 3 responses", 1),
        (gives(200, '{"rewards": [1, null, 2]}'), {}, "gave None .* rows.jsonl:2", 1),
        (gives(200, '{"rewards": [1, NaN, 2]}'), {}, "gave nan .* rows.jsonl:2", 1),
        (late, {"retries": 0, "timeout_s": 0.2}, r"given up after 1 attempts.*timed out", 1),
    ],
)  # fmt: skip
def test_an_endpoint_that_fails_ends_with_what_it_said(
    tmp_path: Path, answer: Answer, keys: dict[str, Any], says: str, times: int
) -> None:
    with endpoint([answer]) as (url, asked), pytest.raises(StageError, match=says):
        values(tmp_path, url=url, **keys)
    assert len(asked) == times


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    with endpoint([lengths]) as (url, _):
        pass
    with pytest.raises(StageError, match=r"given up after 1 attempts.*refused"):
        values(tmp_path, url=url, retries=0)


def test_rows_are_checked_before_anything_is_scored(tmp_path: Path) -> None:
    records = [*RECORDS, {"id": "rows.jsonl:4", "text": "a", "reference": None, "columns": {"answer": "none"}}]
    with pytest.raises(RequestError, match=r"rewards.own: row rows.jsonl:4: column 'answer' holds no number"):
        open_text_terms({"own": TERM.validate_python({"rule": "number"})}, tmp_path, records)


def test_words_of_prompts_and_their_answers_are_known(tmp_path: Path) -> None:
    records = [{"id": "r", "text": "<|user|>ask me", "reference": "an answer", "columns": {"hint": "maybe"}}]
    term = TERM.validate_python({"rule": "real_words"})
    (opened,) = open_text_terms({"words": term}, tmp_path, records)
    assert opened.values(["ask an answer maybe xqz"], records) == [pytest.approx(4 / 5)]
    assert not math.isnan(opened.values([""], records)[0])
