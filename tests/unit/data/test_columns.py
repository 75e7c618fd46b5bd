"""TRL's columns are read as they are; whatever else is refused with the reason."""

from typing import Any

import pytest

from trainers.data.bad_row import BadRow
from trainers.data.columns import Reading, convert
from trainers.data.row_forms import extract_prompt

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
        (
            "judged",
            {"prompt": "Q", "completion": "A", "label": True},
            {"prompt": "Q", "completion": "A", "label": True},
        ),
        ("judged", {"prompt": "Q", "completion": "A", "label": 0}, {"prompt": "Q", "completion": "A", "label": False}),
        (
            "judged",
            {"prompt": [USER], "completion": "good", "label": "False"},
            {"prompt": [USER], "completion": [GOOD], "label": False},
        ),
        (
            "judged",
            {"messages": [USER, BAD, USER, GOOD], "label": True},
            {"prompt": [USER, BAD, USER], "completion": [GOOD], "label": True},
        ),
        ("prompts", {"prompt": "Q"}, {"prompt": "Q", "reference": None}),
        ("prompts", {"messages": [USER, GOOD]}, {"prompt": [USER], "reference": "good"}),
    ],
)
def test_standard_rows(role: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert convert(row, role, {}).columns == expected


@pytest.mark.parametrize(
    ("role", "row", "complaint"),
    [
        ("text", {"body": "abc"}, "needs text .* completion$"),
        ("text", {"text": 3}, "column 'text' is int"),
        ("text", {"text": None}, "needs text"),
        ("instructions", {"prompt": "Q"}, "needs messages .* text$"),
        ("instructions", {"question": "Q"}, "needs messages"),
        ("instructions", {"messages": []}, "has no message"),
        ("instructions", {"messages": [{"content": "Q"}]}, r"messages\[0\] has no role"),
        ("instructions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "other than text"),
        ("instructions", {"prompt": "Q", "completion": [GOOD]}, "'prompt' is text but 'completion' holds messages"),
        ("text", {"prompt": [USER], "completion": [GOOD]}, "column 'prompt' is list"),
        ("seq2seq", {"text": "abc"}, "needs messages .* completion$"),
        ("seq2seq", {"messages": [USER, GOOD, USER]}, "last message .* the assistant's"),
        ("seq2seq", {"messages": [GOOD]}, "the assistant's, after another"),
        ("preferences", {"prompt": "Q", "chosen": "a"}, "chosen and rejected"),
        ("preferences", {"chosen": "a", "rejected": [BAD]}, "both be messages"),
        ("judged", {"prompt": "Q", "completion": "A"}, "completion and label"),
        ("judged", {"prompt": "Q", "completion": "A", "label": "bad"}, "column 'label' is 'bad'"),
        ("judged", {"prompt": "Q", "completion": "A", "label": 2}, "column 'label' is 2"),
        ("judged", {"messages": [GOOD], "label": 1}, "last message"),
        ("judged", {"messages": [GOOD, USER], "label": 1}, "last message"),
        ("prompts", {"text": "Q"}, "prompt or messages"),
        ("prompts", {"messages": [GOOD]}, "no turn before"),
    ],
)
def test_other_rows_are_refused_with_the_reason(role: Any, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRow, match=complaint):
        convert(row, role, {})


def test_columns_are_renamed() -> None:
    row = {"instruction": "Q", "output": "A"}
    assert convert(row, "instructions", {"prompt": "instruction", "completion": "output"}).columns == {
        "prompt": "Q",
        "completion": "A",
    }
    with pytest.raises(BadRow, match=r"'answer' .mapped to completion.") as refusal:
        convert(row, "instructions", {"prompt": "instruction", "completion": "answer"})
    assert refusal.value.suggestion == "columns there: instruction, output"


def test_text_parts_are_joined_and_other_keys_kept() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"}
    assert convert({"messages": [message]}, "instructions", {}).columns == {
        "messages": [{"role": "user", "content": "ab", "name": "Ann"}]
    }


def test_prompt_extraction_by_hand() -> None:
    assert extract_prompt("Human: hi yes", "Human: hi no") == ("Human: hi", " yes", " no")
    assert extract_prompt("a b ", "x b ") == ("", "a b ", "x b ")


def reading(row: dict[str, Any], role: Any = "instructions", columns: dict[str, str] | None = None) -> Reading:
    return convert(row, role, columns or {}).reading


def test_columns_that_hold_something_and_are_not_read_are_named() -> None:
    row = {"messages": [USER, GOOD], "id": 7, "score": None, "notes": "", "prompt": "Q"}
    assert reading(row).unread == ("id", "prompt")
    assert reading({"chosen": "a", "rejected": "b", "prompt": "Q", "margin": 2}, "preferences").unread == ("margin",)
    assert reading({"body": "a", "topic": "b"}, "text", {"text": "body"}).unread == ("topic",)
    assert reading({"text": "a", "system": "Be short."}, "text").unread == ("system",)


@pytest.mark.parametrize(
    ("role", "row", "expected"),
    [
        (
            "instructions",
            {
                "system": "Be short.",
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
            },
            {"messages": [{"role": "system", "content": "Be short."}, USER, GOOD]},
        ),
        (
            "instructions",
            {"system": "Be short.", "prompt": "Q", "completion": "A"},
            {"prompt": "Q", "completion": "A", "system": "Be short."},
        ),
        (
            "instructions",
            {"system": "other", "messages": [{"role": "system", "content": "own"}, USER, GOOD]},
            {"messages": [{"role": "system", "content": "own"}, USER, GOOD]},
        ),
        (
            "prompts",
            {"prompt": [USER], "tools": '[{"name": "f", "default": null}]', "reference": "A"},
            {"prompt": [USER], "reference": "A", "tools": [{"name": "f"}]},
        ),
    ],
)
def test_system_prompts_and_tools_of_a_row_are_read(role: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    converted = convert(row, role, {})
    assert converted.columns == expected
    assert converted.reading.unread == ()


def test_nulls_that_a_table_writes_for_other_rows_keys_are_no_arguments() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "zone": None}}}
    (turn,) = convert({"messages": [{"role": "assistant", "tool_calls": [call]}]}, "instructions", {}).columns[
        "messages"
    ]
    assert turn["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


def test_shareGPT_senders() -> None:
    said = [
        ("human", "Q"),
        ("ChatGPT", "A"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "3"),
    ]
    turns = [{"from": sender, "value": value} for sender, value in said]
    converted = convert({"conversations": turns}, "instructions", {})
    assert converted.reading.form == "sharegpt"
    assert converted.columns["messages"] == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "3"},
    ]
    with pytest.raises(BadRow, match=r"messages\[0\] is from 'narrator'") as refusal:
        convert({"conversations": [{"from": "narrator", "value": "x"}]}, "instructions", {})
    assert "observation" in refusal.value.suggestion


def test_rows_with_an_empty_turn_are_left_out_but_a_system_prompt_may_be_empty() -> None:
    for empty in ({"role": "assistant", "content": " "}, {"role": "user", "content": None}):
        assert reading({"messages": [USER, empty]}).drop == "empty_turn"
    with pytest.raises(BadRow, match="no content"):
        reading({"messages": [USER, {"role": "assistant"}]})
    assert reading({"messages": [{"role": "system", "content": ""}, USER, GOOD]}).drop == ""


def test_a_turn_of_weight_0_keeps_its_weight_and_others_lose_it() -> None:
    for key, value in (("weight", 0), ("train", False), ("loss", False)):
        turns = convert({"messages": [USER, {**GOOD, key: value}, {**BAD, key: 1}]}, "instructions", {}).columns
        assert turns["messages"] == [USER, {**GOOD, "weight": 0}, BAD]
    with pytest.raises(BadRow, match=r"messages\[0\] has weight 0.5"):
        convert({"messages": [{**GOOD, "weight": 0.5}]}, "instructions", {})


ANSWERS = [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}, {"answer": "c", "rank": 3.0}]
SCORED = [{"response": "b", "overall_score": 5}, {"response": "a", "overall_score": 9.5}]


@pytest.mark.parametrize(
    ("form", "role", "row", "expected"),
    [
        (
            "alpaca",
            "instructions",
            {"instruction": "Do", "input": "x", "output": "A"},
            {"prompt": "Do\n\nx", "completion": "A"},
        ),
        (
            "alpaca",
            "instructions",
            {"instruction": "Do", "input": "", "output": "A"},
            {"prompt": "Do", "completion": "A"},
        ),
        (
            "alpaca",
            "instructions",
            {"instruction": "Q", "output": "good", "history": [["Q", "bad"]], "system": "Be."},
            {"prompt": [{"role": "system", "content": "Be."}, USER, BAD, USER], "completion": [GOOD]},
        ),
        ("alpaca", "prompts", {"instruction": "Do", "output": "A"}, {"prompt": "Do", "reference": "A"}),
        (
            "dolly",
            "seq2seq",
            {"instruction": "Do", "context": "c", "response": "A"},
            {"prompt": "c\n\nDo", "completion": "A"},
        ),
        (
            "p3",
            "instructions",
            {"inputs_pretokenized": "Q", "targets_pretokenized": "A"},
            {"prompt": "Q", "completion": "A"},
        ),
        (
            "question-answer",
            "instructions",
            {"question": "Q", "answer": "x\n#### 7"},
            {"prompt": "Q", "completion": "x\n#### 7"},
        ),
        (
            "open-orca",
            "instructions",
            {"system_prompt": "Be.", "question": "Q", "response": "A"},
            {"prompt": "Q", "completion": "A", "system": "Be."},
        ),
        ("nectar", "preferences", {"prompt": "Q", "answers": ANSWERS}, {"prompt": "Q", "chosen": "a", "rejected": "c"}),
        (
            "ultrafeedback",
            "preferences",
            {"instruction": "Q", "completions": SCORED},
            {"prompt": "Q", "chosen": "a", "rejected": "b"},
        ),
        (
            "orca-dpo",
            "preferences",
            {"question": "Q", "chosen": "same a", "rejected": "same b"},
            {"prompt": "Q", "chosen": "same a", "rejected": "same b"},
        ),
        (
            "",
            "preferences",
            {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ),
    ],
)
def test_published_forms(form: str, role: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    converted = convert(row, role, {})
    assert converted.columns == expected
    assert converted.reading == Reading(form)


def test_a_form_is_not_recognised_where_columns_are_mapped() -> None:
    row = {"instruction": "Do", "input": "x", "output": "A"}
    assert reading(row, columns={"prompt": "instruction", "completion": "output"}) == Reading("", ("input",))


def test_columns_name_places_and_texts_of_several() -> None:
    row = {"instruction": "Do", "input": "", "instances": [{"output": "A"}], "a.b": "dotted"}

    def mapped(written: str) -> Any:
        return convert(row, "text", {"text": written}).columns["text"]

    assert mapped("{instruction}\n\n{input}") == "Do"
    assert mapped("{{x}} {instruction}: {instances[0].output}") == "{x} Do: A"
    assert mapped("instances[0].output") == "A"
    assert mapped("instances[-1].output") == "A"
    assert mapped("a.b") == "dotted"
    for written, complaint, advice in (
        ("{instructoin}", "no column 'instructoin'", "did you mean instruction?"),
        ("instances[3].output", r"'instances' has no 3", "it is 1 items"),
        ("instances[0].input", r"'instances\[0\]' has no 'input'", "there are: output"),
        ("{instances}", r"\{instances\} \(in text\) is list, not text", ""),
    ):
        with pytest.raises(BadRow, match=complaint) as refusal:
            mapped(written)
        assert advice in refusal.value.suggestion
