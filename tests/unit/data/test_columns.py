"""TRL's columns are read as they are; whatever else is refused with the reason."""

from typing import Any

import pytest

from trainers.data.columns import BadRow, canonical, extract_prompt

USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("role", "row", "expected"),
    [
        ("text", {"text": "abc", "other": 1}, {"text": "abc"}),
        ("instructions", {"messages": [USER, GOOD]}, {"messages": [USER, GOOD]}),
        ("instructions", {"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "A"}),
        ("instructions", {"prompt": [USER], "completion": [GOOD]}, {"prompt": [USER], "completion": [GOOD]}),
        ("instructions", {"prompt": [USER], "completion": "good"}, {"prompt": [USER], "completion": [GOOD]}),
        ("instructions", {"text": "abc"}, {"text": "abc"}),
        ("text", {"prompt": "Q", "completion": "A"}, {"text": "Q\nA", "prompt": "Q"}),
        ("text", {"text": "abc", "prompt": "Q", "completion": "A"}, {"text": "abc"}),
        ("seq2seq", {"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "A"}),
        ("seq2seq", {"prompt": [USER], "completion": "good"}, {"prompt": [USER], "completion": "good"}),
        ("seq2seq", {"messages": [USER, BAD, USER, GOOD]}, {"prompt": [USER, BAD, USER], "completion": "good"}),
        (
            "instructions",
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}]},
            {"messages": [USER, GOOD]},
        ),
        (
            "preferences",
            {"prompt": "Q", "chosen": "a", "rejected": "b"},
            {"prompt": "Q", "chosen": "a", "rejected": "b"},
        ),
        (
            "preferences",
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ),
        (
            "preferences",
            {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ),
        ("prompts", {"prompt": "Q"}, {"prompt": "Q", "reference": None}),
        ("prompts", {"messages": [USER, GOOD]}, {"prompt": [USER], "reference": "good"}),
    ],
)
def test_standard_rows(role: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert canonical(row, role, {}) == expected


@pytest.mark.parametrize(
    ("role", "row", "complaint"),
    [
        ("text", {"body": "abc"}, "needs text or prompt and completion"),
        ("text", {"text": 3}, "column 'text' is int, not text"),
        ("text", {"text": None}, "needs text"),
        ("instructions", {"prompt": "Q"}, "needs messages or prompt and completion or text"),
        ("instructions", {"question": "Q"}, "needs messages"),
        ("instructions", {"messages": []}, "has no message"),
        ("instructions", {"messages": [{"content": "Q"}]}, r"messages\[0\] has no role"),
        ("instructions", {"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] has no content"),
        ("instructions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "other than text"),
        ("instructions", {"prompt": "Q", "completion": [GOOD]}, "'prompt' is text but 'completion' holds messages"),
        ("text", {"prompt": [USER], "completion": [GOOD]}, "column 'prompt' is list, not text"),
        ("seq2seq", {"text": "abc"}, "needs messages or prompt and completion$"),
        ("seq2seq", {"messages": [USER, GOOD, USER]}, "last message must be the assistant's"),
        ("seq2seq", {"messages": [GOOD]}, "last message must be the assistant's, after another"),
        ("preferences", {"prompt": "Q", "chosen": "a"}, "needs chosen and rejected"),
        ("preferences", {"chosen": "a", "rejected": [BAD]}, "both be text or both be messages"),
        ("prompts", {"text": "Q"}, "needs prompt or messages"),
        ("prompts", {"messages": [GOOD]}, "no turn before"),
    ],
)
def test_other_rows_are_refused_with_the_reason(role: Any, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRow, match=complaint):
        canonical(row, role, {})


def test_columns_are_renamed() -> None:
    row = {"instruction": "Q", "output": "A"}
    assert canonical(row, "instructions", {"prompt": "instruction", "completion": "output"}) == {
        "prompt": "Q",
        "completion": "A",
    }
    with pytest.raises(BadRow, match=r"no column 'answer' .mapped to completion.") as refusal:
        canonical(row, "instructions", {"prompt": "instruction", "completion": "answer"})
    assert refusal.value.suggestion == "columns there: instruction, output"


def test_text_parts_are_joined_and_other_keys_kept() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"}
    assert canonical({"messages": [message]}, "instructions", {}) == {
        "messages": [{"role": "user", "content": "ab", "name": "Ann"}]
    }


def test_prompt_extraction_by_hand() -> None:
    assert extract_prompt("Human: hi yes", "Human: hi no") == ("Human: hi", " yes", " no")
    assert extract_prompt("a b ", "x b ") == ("", "a b ", "x b ")
