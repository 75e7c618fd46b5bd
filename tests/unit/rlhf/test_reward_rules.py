"""Rules on exact cases, hostile ones among them."""

import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from recipes.errors import StageError
from recipes.stages.rewards.answers import MathVerify, last_number
from recipes.stages.rewards.term import Rule
from recipes.stages.rewards.union import RewardTerm
from rlhf.rewards.mathematics import MathProcess

TERM: TypeAdapter[Any] = TypeAdapter(RewardTerm)
LONG = "a " * 200_000


def rule(name: str, **keys: Any) -> Rule:
    term = TERM.validate_python({"rule": name, **keys})
    assert isinstance(term, Rule)
    return term


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("5-3", "3"),
        ("x = -4", "-4"),
        ("1,000.50", "1000.50"),
        ("\N{MINUS SIGN}7", "-7"),
        ("-.5", "-0.5"),
        ("a 3 then 12 apples", "12"),
        ("18 euros, 50%", "50"),
        ("", None),
        ("\N{ARABIC-INDIC DIGIT ONE}", None),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


@pytest.mark.parametrize(
    ("term", "text", "answer", "value"),
    [
        (rule("number"), "so it is 18", "9 + 9 = <<9+9=18>>18\n#### 18", 1),
        (rule("number"), "18.0", 18, 1),
        (rule("number"), "18.01", 18, 0),
        (rule("number"), "", "18", 0),
        (rule("number"), "1" * 100_000, "1" * 100_000, 1),
        (rule("exact"), " caf\N{LATIN SMALL LETTER E WITH ACUTE}\n", "cafe\N{COMBINING ACUTE ACCENT}", 1),
        (rule("exact"), "Yes", "yes", 0),
        (rule("exact", ignore_case=True), "STRASSE", "stra\N{LATIN SMALL LETTER SHARP S}e", 1),
        (rule("exact"), "", "yes", 0),
        (rule("exact"), "yes yes", "yes", 0),
        (rule("regex", pattern=r"#### (\d+)", column="answer"), "so\n#### 18", 18, 1),
        (rule("regex", pattern=r"#### (\d+)", column="answer"), "so\n#### 19", 18, 0),
        (rule("regex", pattern=r"#### (\d+)", column="answer"), "18", 18, 0),
        (rule("regex", pattern=r"\d+"), "a1", None, 1),
        (rule("regex", pattern=r"\d+", whole=True), "a1", None, 0),
        (rule("regex", pattern=r"\d+", whole=True), " 1\n", None, 1),
        (rule("regex", pattern=r"x"), "", None, 0),
    ],
)
def test_rules_on_answers(term: Rule, text: str, answer: Any, value: float) -> None:
    assert term.value(text, {"answer": answer}) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>\n<answer>b</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("x <think>a</think><answer>b</answer>", 0),
        ("", 0),
        ("<think>" * 100_000, 0),
    ],
)
def test_tags(text: str, value: float) -> None:
    assert rule("format", tags=["think", "answer"]).value(text, {}) == value


def test_tags_may_stand_in_other_text() -> None:
    assert rule("format", tags=["b"], outside=True).value("a <b>c</b> d", {}) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', 1),
        ('{"a": 1.5}', 0),
        ('{"a": NaN}', 0),
        ('{"b": 1}', 0),
        ('Sure! {"a": 1}', 0),
        ("", 0),
        ("[" * 100_000, 0),
        ('{"a": ' + "1" * 10_000 + "}", 0),  # beyond Python's limit on digits
    ],
)
def test_json_schema(text: str, value: float) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert rule("json_schema", schema=schema).value(text, {}) == value


def test_a_schema_fetches_nothing() -> None:
    with pytest.raises(StageError, match=r"refers to 'http://127\.0\.0\.1:1/schema\.json'"):
        rule("json_schema", schema={"$ref": "http://127.0.0.1:1/schema.json"}).value("{}", {})


@pytest.mark.parametrize(
    ("keys", "text", "value"),
    [
        ({"max": 2}, "a b", 1),
        ({"max": 2}, "a b c", 0),
        ({"max": 2, "slack": 1}, "a b c", 0.5),
        ({"min": 2}, "a", 0),
        ({"min": 2, "max": 3, "slack": 4}, "", 0.6),
        ({"max": 3, "unit": "characters"}, "abcd", 0),
        ({"min": 1}, "", 0),
        ({"max": 100, "slack": 50}, LONG, 0),
    ],
)
def test_length(keys: dict[str, Any], text: str, value: float) -> None:
    assert rule("length", **keys).value(text, {}) == pytest.approx(value)


def test_real_words_are_those_listed_or_those_of_the_prompts() -> None:
    listed = rule("real_words", words=["Über", "the"]).scorer(lambda: ["unused"])
    assert listed("the ÜBER 12 xq", {}) == pytest.approx(2 / 3)
    of_prompts = rule("real_words").scorer(lambda: ["What is a list?", "A sequence."])
    assert of_prompts("A list is a seqence", {}) == pytest.approx(4 / 5)
    assert of_prompts("", {}) == 0
    assert of_prompts("12 34", {}) == 0
    assert of_prompts(LONG, {}) == 1


def test_repetition() -> None:
    twice = rule("repetition", run=2)
    assert twice.value("a b a b", {}) == pytest.approx(2 / 3)
    assert twice.value("a b c", {}) == 1
    assert twice.value("a", {}) == 1
    assert twice.value("", {}) == 0
    assert twice.value(LONG, {}) < 1e-4


def test_a_pattern_that_backtracks_ends_with_a_named_error_instead_of_a_hang() -> None:
    started = time.process_time()
    with pytest.raises(StageError, match=r"pattern '\(a\|aa\)\+\$' .* 2 s .* 61 characters"):
        rule("regex", pattern="(a|aa)+$").value("a" * 60 + "b", {})
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rule": "regex", "pattern": "("}, "regular expression"),
        ({"rule": "json_schema", "schema": {"type": "objct"}}, "not a JSON schema at"),
        ({"rule": "length"}, "min, max"),
        ({"rule": "length", "min": 3, "max": 2}, r"max \(2\) is below min \(3\)"),
        ({"rule": "format", "tags": ["a", "a"]}, "names 'a' twice"),
        ({"rule": "format", "tags": ["a b"]}, "pattern"),
        ({"python": "no colon"}, "pattern"),
        ({"url": "ftp://x"}, "pattern"),
        ({"weight": 2}, "a mapping with"),
    ],
)
def test_terms_that_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TERM.validate_python(keys)


def test_rows_that_a_term_cannot_read_are_named() -> None:
    assert rule("number").row_rule({"answer": "none"}) == "column 'answer' holds no number: 'none'"
    assert "'answer' is NoneType" in (rule("exact").row_rule({"answer": None}) or "")
    assert "'answer' is bool" in (rule("exact").row_rule({"answer": True}) or "")
    assert rule("exact").row_rule({"answer": 3}) == ""


def test_math_verify_compares_mathematics() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    process = MathProcess(MathVerify(rule="math_verify"))
    texts = ["0.5", "so it is \\boxed{\\frac{2}{4}}", "2", "", "$" + "(" * 3000]
    assert process.values(texts, [{"answer": "\\frac{1}{2}"}] * len(texts)) == [1, 1, 0, 0, 0]
    process.close()
