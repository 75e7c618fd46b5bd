"""Where responses stand in a rendered conversation."""

from typing import Any

import pytest

from recipes.data.tokenizers import DEFAULT_CHAT_TEMPLATE
from recipes.errors import RequestError
from recipes.tokenizers.chat_template import render, template_names
from trainers.data.template import response_spans

TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": ""}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
REWRITING = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<{{ m.content }}>{% elif loop.last %}{{ m.content }}."
    "{% else %}(hidden){% endif %}{% endfor %}"
)


def spans(template: str) -> list[str]:
    text, found = response_spans(template, TALK, TOKENS)
    return [text[start:end] for start, end in found]


def test_default_template_marks_each_answer_with_its_end_token() -> None:
    assert spans(DEFAULT_CHAT_TEMPLATE) == ["Hello</s>", "See you</s>"]


def test_generation_prompt_is_no_answer() -> None:
    text, found = response_spans(DEFAULT_CHAT_TEMPLATE, TALK, TOKENS)
    prompt = render(DEFAULT_CHAT_TEMPLATE, TALK[:2], TOKENS, add_generation_prompt=True)
    assert prompt.endswith("<|assistant|>\n")
    assert found[0][0] == len(prompt)
    assert text.startswith(prompt)


def test_generation_blocks_are_the_answers() -> None:
    text, _ = response_spans(MARKED, TALK, TOKENS)
    assert spans(MARKED) == ["Hello</s>", "See you</s>"]
    assert text == render(MARKED, TALK, TOKENS)


def test_a_template_that_rewrites_earlier_turns_keeps_the_last_answer_only() -> None:
    assert spans(REWRITING) == ["See you."]


def test_a_template_error_is_the_users_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", TALK, TOKENS)
    with pytest.raises(RequestError, match="chat template"):
        render("{% for %}", TALK, TOKENS)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", "unsafe"),
        ("{{ 9 ** 9 ** 9 }}", r"may not use \*\*"),
        ("{{ 'x' * 10000000000 }}", "repeat a text up to"),
        ("{{ 10000000000 * messages }}", "repeat a text up to"),
        ("{% for i in range(10000000000) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_templates_run_in_a_sandbox(refused: Any, template: str, says: str) -> None:
    with refused(RequestError, says, "chat template"):
        render(template, TALK, TOKENS)
    assert render("{{ 'ab' * 3 }}{{ 2 * 3 }}", TALK, TOKENS) == "ababab6"


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, MARKED])
def test_a_turn_of_weight_0_is_no_target(template: str) -> None:
    talk = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    text, found = response_spans(template, talk, TOKENS)
    assert [text[start:end] for start, end in found] == ["See you</s>"]
    assert text == response_spans(template, TALK, TOKENS)[0]


def test_blocks_of_generation_must_be_those_of_the_turns_where_one_has_weight_0() -> None:
    talk = [TALK[1], {**TALK[2], "weight": 0}, TALK[3], TALK[4]]
    with pytest.raises(RequestError, match=r"1 blocks .* 2 turns"):
        response_spans("{% generation %}{{ messages | length }}{% endgeneration %}", talk, TOKENS)


def test_tools_reach_the_template() -> None:
    template = "{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}" + DEFAULT_CHAT_TEMPLATE
    text, found = response_spans(template, TALK, TOKENS, tools=[{"name": "weather"}])
    assert text.startswith("<weather>")
    assert [text[start:end] for start, end in found] == ["Hello</s>", "See you</s>"]


def test_what_a_template_mentions() -> None:
    names = template_names("{% if tools %}{% endif %}{{ messages[0]['name'] }}{{ message.tool_calls }}{{ 'x' in m }}")
    assert {"tools", "messages", "name", "tool_calls", "x"} <= names
    assert "reasoning" not in names


CALLING = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}<{{ c.function.arguments | tojson }}>"
    "{% endfor %}{% endfor %}"
)
JOINING = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '<' + c.function.arguments + '>' }}"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CALLING, JOINING])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_arguments_of_tool_calls_reach_each_template_as_it_takes_them(template: str, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert render(template, [message], TOKENS) == '<{"city": "Rome"}>'
    assert call["function"]["arguments"] == arguments
