"""What strict YAML reads, and what it refuses where."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.errors import Problem, RecipeError
from recipes.loading.yaml_text import MAX_BYTES, parse_yaml, scalar


def _problems(data: bytes) -> list[Problem]:
    try:
        return parse_yaml(data, "r.yaml").problems
    except RecipeError as error:
        return error.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), ("2_000_000", 2_000_000), ("-3", -3), ("+3", 3), (".5", 0.5), ("5.", 5.0),
        ("0", 0), ("0.1", 0.1), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("12:30", "12:30"), ("1.2.3", "1.2.3"), ("1e", "1e"),
        ("50 steps", "50 steps"),
        ("2026-11-22", "2026-11-22"), ("inf", "inf"), ("_1", "_1"), ("1__0", "1__0"),
    ],
)  # fmt: skip
def test_a_plain_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["0123", "00", "-01", ".inf", "-.Inf", ".nan", "0x1F", "0o7", "1" * 50, "1e999"])
def test_a_misleading_scalar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"number|decimal|infinities"):
        scalar(text)


@given(st.one_of(st.integers(-(10**15), 10**15), st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_numbers_survive_a_round_trip(number: int | float) -> None:
    found = scalar(repr(number))
    assert math.isclose(found, number, rel_tol=1e-12, abs_tol=0)
    assert type(found) is type(number)


def test_quoted_scalars_stay_text() -> None:
    assert parse_yaml("a: '1'\nb: \"true\"\n", "r.yaml").value == {"a": "1", "b": "true"}


@pytest.mark.parametrize(
    ("data", "line", "code"),
    [
        (b"a: 1\na: 2\n", 2, "duplicate-key"),
        (b"a: &x 1\nb: *x\n", 1, "unsupported-yaml"),
        (b"a: {b: 1}\n<<: {c: 1}\n", 2, "unsupported-yaml"),
        (b"a: !!python/name:os.system x\n", 1, "unsupported-yaml"),
        (b"a: 1\n---\nb: 1\n", 2, "invalid-yaml"),
        (b"a: 1\n? [x]\n: 2\n", 2, "invalid-yaml"),
        (b"a: 1\nb: \x00\n", 2, "control-character"),
        (b"a: 1\nb: \xff\n", 2, "not-utf8"),
        (b"a: [1\nb: 2\n", 2, "invalid-yaml"),
        (b"a:\n\t- 1\n", 2, "invalid-yaml"),
        (b"", 1, "invalid-yaml"),
        (b"# only a comment\n", 2, "invalid-yaml"),
    ],
)
def test_what_is_forbidden_is_named_with_its_line(data: bytes, line: int, code: str) -> None:
    problem = _problems(data)[0]
    assert (problem.code, problem.file, problem.line) == (code, "r.yaml", line)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 5000,
        b"{a: " * 5000,
        b"- " * 5000,
        b"a: " + b"x" * 20_000_000,
        b"a: [" + b"1," * 200_000 + b"]",
        b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n",
    ],
    ids=["nested lists", "nested mappings", "nested dashes", "long scalar", "many values", "alias bomb"],
)
def test_hostile_text_is_refused_quickly(data: bytes) -> None:
    start = time.process_time()
    assert _problems(data)
    assert time.process_time() - start < 1.0


def test_a_byte_order_mark_and_crlf_are_harmless() -> None:
    document = parse_yaml(b"\xef\xbb\xbfa: 1\r\nb: text\r\n", "r.yaml")
    assert document.value == {"a": 1, "b": "text"}
    assert document.marks[("b",)].line == 2


def test_the_size_limit_is_in_the_message() -> None:
    assert str(MAX_BYTES) in _problems(b"#" * (MAX_BYTES + 1))[0].message


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    _problems(data)
