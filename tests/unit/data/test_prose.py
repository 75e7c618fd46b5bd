"""First sentences, paragraphs and near copies."""

import pytest

from trainers.data.demo.prose import CopyIndex, body, is_near_copy, paragraphs, shingles, summary


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the sum.", "Return the sum."),
        ("return the sum of\n  two numbers", "Return the sum of two numbers."),
        ("Open a file. Then read it.", "Open a file."),
        ("Use e.g. a list of names. More.", "Use e.g. a list of names."),
        ("add(a, b) -> int\n\nReturn the sum of both.", "Return the sum of both."),
        ("add(a, b)\nReturn the sum of both.", "Return the sum of both."),
        ("shutil.py - Copy files and folders", "Copy files and folders."),
        ("Return ``x`` of :class:`Point` and *y*:", "Return x of Point and y."),
        ("Internal function.\n\nRegister a new handler.", "Register a new handler."),
        ("Is it a file?", "Is it a file?"),
    ],
)
def test_summaries(doc: str, expected: str) -> None:
    assert summary(doc) == expected


@pytest.mark.parametrize(
    ("doc", "rest"),
    [
        ("Open a file. Then read it.\n\nNever twice.", ["Then read it.", "Never twice."]),
        ("Use e.g. a list of names.\n\n    >>> names(1)\n    2", [">>> names(1)\n2"]),
        ("add(a, b) -> int\n\nReturn the sum of both.\nOr none.\n\nSlow.", ["Or none.", "Slow."]),
        ("shutil.py - Copy files and folders.\nAnd links.", ["And links."]),
        ("Internal function.\n\nRegister a new handler.  It stays.", ["It stays."]),
        ("Return the sum.", []),
        ("", []),
    ],
)
def test_a_body_is_what_follows_the_first_sentence(doc: str, rest: list[str]) -> None:
    assert body(doc) == rest


@pytest.mark.parametrize(
    "doc", ["", "Too short.", ">>> add(1, 2)\n3", "x = [1, 2] or so on", "- a list item here", "word " * 40, "é è ê ë."]
)
def test_what_is_no_sentence_has_no_summary(doc: str) -> None:
    assert summary(doc) is None


def test_paragraphs_join_prose_and_keep_code() -> None:
    text = "First line\nsecond line.\n\n   >>> add(1)\n   2\n\nTitle\n*****\n\n  one\n    two"
    assert paragraphs(text) == ["First line second line.", ">>> add(1)\n2", "Title", "one\n  two"]


@pytest.mark.parametrize(
    ("one", "other", "copies"),
    [
        ("Return the sum.", "return THE sum", True),
        ("Return the sum.", "Return the product.", False),
        ("Return a list of the names of all open files.", "Return the list of the names of all open files now.", True),
        ("Return a list of the names of all open files.", "Close every socket that was opened by this server.", False),
        ("", "", False),
    ],
)
def test_near_copies(one: str, other: str, copies: bool) -> None:
    assert is_near_copy(shingles(one), shingles(other)) is copies
    assert CopyIndex([one, "Something else altogether."]).has_near_copy(other) is copies


def test_a_long_text_that_contains_a_held_out_sentence_is_a_copy() -> None:
    sentence = "Return a list of the names of all open files."
    assert CopyIndex([sentence]).has_near_copy("Some words before it. " + sentence + " And words that come after it.")
