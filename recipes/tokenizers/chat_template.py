"""Chat templates: Jinja in transformers' convention, in a sandbox; what they write after an assistant's turn."""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Const, Getattr, Name, Node
from jinja2.parser import Parser

from recipes.errors import RequestError
from recipes.tokenizers.template_sandbox import TEMPLATE_ERRORS, TemplateSandbox, try_template

Message = Mapping[str, Any]
OPEN, CLOSE = "\ue000\ue001", "\ue001\ue000"
"""Private-use characters that mark generation blocks while spans are sought."""
_ANSWER = "It is four."


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` notes which characters an assistant wrote (transformers' convention)."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = str(caller())
        return f"{OPEN}{text}{CLOSE}" if self.environment.globals.get("_mark") else text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _refuse_nothing(message: str) -> None:
    """Stands for `raise_exception` where a template is tried with turns that it may not take."""


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=32)
def compile_template(template: str, *, mark: bool = False, refuses: bool = True) -> jinja2.Template:
    """Compile a template; raises TEMPLATE_ERRORS.

    With `mark` its generation blocks are marked; without `refuses` its `raise_exception` does nothing.
    """
    environment = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception if refuses else _refuse_nothing
    environment.globals["_mark"] = mark
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    mark: bool = False,
) -> str:
    """Render messages; `tokens` gives eos_token, pad_token, ... Raises RequestError with the template's own complaint.

    A turn's `weight` says whether it is learnt, and is no template's business.

    `strftime_now` is undefined, so that a template that would write today's date takes its default.
    """
    try:
        return compile_template(template, mark=mark).render(
            messages=_for_template(template, messages),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
            **tokens,
        )
    except TEMPLATE_ERRORS as error:
        raise RequestError(f"chat template: {error or type(error).__name__}") from None


def after_answer(template: str, role: str, text: str, tokens: Mapping[str, str]) -> str:
    """What a template writes after the words of an answer: its end, a turn of a role, the beginning of the next answer.

    Raises RequestError for a template that does not take such a turn, or that writes earlier turns otherwise then.
    """
    turns = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": _ANSWER}]
    before = render(template, turns, tokens)
    after = render(template, [*turns, {"role": role, "content": text}], tokens, add_generation_prompt=True)
    opening = before[: before.rindex(_ANSWER) + len(_ANSWER)] if _ANSWER in before else None
    if opening is None or not after.startswith(opening):
        raise RequestError("chat template: it writes an answer otherwise once another turn follows it")
    return after[len(opening) :]


def _for_template(template: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages without weights, with the arguments of tool calls as the template takes them."""
    found = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    for message in found:
        if calls := message.get("tool_calls"):
            takes_text = takes_arguments_as_text(template)
            message["tool_calls"] = [_with_arguments(call, takes_text=takes_text) for call in calls]
    return found


def _with_arguments(call: Any, *, takes_text: bool) -> Any:
    """Return a tool call whose arguments are an object, or its JSON; other forms of calls stay as they are."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str) and not takes_text:
        try:
            read = json.loads(arguments)
        except ValueError:
            return call
        arguments = read if isinstance(read, Mapping) else arguments
    elif isinstance(arguments, Mapping) and takes_text:
        arguments = _tojson(arguments)
    else:
        return call
    return {**call, "function": {**dict(function or {}), "arguments": arguments}}


@lru_cache(maxsize=32)
def takes_arguments_as_text(template: str) -> bool:
    """Tell whether a template fails on a tool call whose arguments are an object, and not where they are its JSON.

    transformers' convention is an object; DeepSeek's templates join the arguments to text.
    """

    def fails(arguments: Any) -> bool:
        call = {"type": "function", "id": "call_0000", "function": {"name": "f", "arguments": arguments}}
        asked, called = {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            _try(compile_template(template), [asked, called], {})
        except TEMPLATE_ERRORS:
            return True
        return False

    return fails({"a": 1}) and not fails('{"a": 1}')


@lru_cache(maxsize=32)
def template_names(template: str) -> frozenset[str]:
    """Every name, attribute and text in a template's code: what it does not mention it does not read.

    Raises RequestError for a template that cannot be compiled.
    """
    try:
        tree = TemplateSandbox(extensions=[_Generation, loopcontrols]).parse(template)
    except TEMPLATE_ERRORS as error:
        raise RequestError(f"chat template: {error}") from None
    names = {str(node.name) for node in tree.find_all(Name)}
    attributes = {str(node.attr) for node in tree.find_all(Getattr)}
    return frozenset(names | attributes | {str(node.value) for node in tree.find_all(Const)})


def template_problem(template: str, roles: Sequence[str] = ()) -> str | None:
    """What is wrong with a template: it cannot be compiled or, with `roles`, it fails on a conversation of theirs.

    That a template refuses a turn by `raise_exception` is no problem here: that depends on the rows.
    """
    try:
        compiled = compile_template(template, refuses=False)
        if roles:
            _try(compiled, [{"role": role, "content": "text"} for role in roles], {}, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        return f"not a usable Jinja template: {error}" + (f" (its line {line})" if line else "")
    except TEMPLATE_ERRORS as error:
        return f"the template fails on a conversation: {error or type(error).__name__}"
    return None


def end_of_turn(template: str, tokens: Mapping[str, str], special_tokens: Collection[str]) -> str | None:
    """The special token that a template writes after an assistant's message.

    None where it writes none of them there, and where it cannot be rendered.
    """
    contents: tuple[Any, ...] = (_ANSWER, [{"type": "text", "text": _ANSWER}])
    for content in contents:  # templates of vision-language models want parts
        messages = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": content}]
        try:
            text = _try(compile_template(template), messages, tokens)
        except TEMPLATE_ERRORS:
            continue
        _, answer, rest = text.rpartition(_ANSWER)
        after = rest.lstrip()
        found = [token for token in special_tokens if token and after.startswith(token)]
        if answer and found:
            return max(found, key=len)
    return None


def _try(compiled: jinja2.Template, messages: Sequence[Message], tokens: Mapping[str, str], **more: Any) -> str:
    given = {"eos_token": "", "bos_token": "", "pad_token": "", "add_generation_prompt": False, **tokens, **more}
    return try_template(compiled, messages=list(messages), tools=None, documents=None, **given)
