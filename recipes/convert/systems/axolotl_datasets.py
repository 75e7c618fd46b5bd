"""axolotl's `datasets`: which rows they are, by their `type`, and which columns hold them."""

from collections.abc import Mapping
from typing import Any

from recipes.convert import quantities as q
from recipes.convert.draft import Draft
from recipes.convert.engine import enter
from recipes.convert.rows import find_source, merge_sources
from recipes.convert.rules import Place, Table, Unfit, carried, changed, no_effect, refused, unless
from recipes.convert.systems.transformers_arguments import OWN_TEMPLATE
from recipes.problem_codes import Code

_PART = no_effect("said by `path`, `name` and `split`")
_KEYS: Table = {
    **{key: carried(f"@{key}") for key in (
        "path", "name", "split", "revision", "data_files", "ds_type", "type", "field", "text_column", "field_messages",
        "field_instruction", "field_input", "field_output", "field_chosen", "field_rejected", "field_prompt",
        "train_on_split", "message_property_mappings", "message_field_role", "message_field_content",
    )},
    "roles": changed("the roles of OpenAI's and ShareGPT's messages are known: system, user, assistant, human, gpt"),
    "roles_to_train": changed("the assistant's turns are trained, or all with `loss_on: all`"),
    "train_on_eos": changed("an answer's end is trained with it"),
    "train_on_eot": changed("an answer's end is trained with it"),
    "chat_template": changed(OWN_TEMPLATE),
    "chat_template_jinja": changed(OWN_TEMPLATE),
    "field_thinking": changed("what a message holds besides its content reaches the chat template as it is"),
    "template_thinking_key": changed("what a message holds besides its content reaches the chat template as it is"),
    "field_tools": refused("tools are not read from a separate column"),
    "drop_system_message": unless(False, then=refused("system messages are kept")),
    "shards": refused("give `part`, as in part: 1/10"),
    "preprocess_shards": no_effect("rows are laid out once, in the store"),
    "trust_remote_code": refused("code of a data set is never run"),
    "conversation": changed(OWN_TEMPLATE),
}  # fmt: skip
_PAIR_LAYOUTS: dict[str, dict[str, str]] = {
    "chat_template": {}, "argilla": {}, "argilla_chat": {}, "ultra": {}, "prompt_pairs": {}, "intel": {},
    "icr": {"prompt": "input"},
}  # fmt: skip
"""axolotl's names of layouts of pairs (`chatml.intel`), and their columns where they are not recognised."""
_JUDGED_LAYOUTS: dict[str, dict[str, str]] = {
    "ultra": {}, "prompt_pairs": {}, "argilla": {"prompt": "instruction"}, "intel": {"prompt": "question"},
    "argilla_chat": {"prompt": "completion[0].content", "completion": "completion[1].content"},
}  # fmt: skip
"""The same of single answers with a verdict."""
_PLAIN_ROLES = ({"role": "from", "content": "value"}, {"role": "role", "content": "content"})


def read_datasets(value: Any, draft: Draft, place: Place) -> None:
    """The rows to train on."""
    _read(value, draft, place, "data")


def read_evaluation(value: Any, draft: Draft, place: Place) -> None:
    """The rows to evaluate on."""
    _read(value, draft, place, "evaluation")


def read_pretraining(value: Any, draft: Draft, place: Place) -> None:
    """The text to train on."""
    items = [{"type": "pretrain", **item} for item in value] if _is_listed(value) else value
    _read({"type": "pretrain", "path": items} if isinstance(items, str) else items, draft, place, "data")


def _is_listed(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _read(value: Any, draft: Draft, place: Place, target: str) -> None:
    items = [value] if isinstance(value, Mapping) else value
    if not _is_listed(items):
        draft.reject(
            place, value, "must be a list of data sets, each a mapping with `path` and `type`", Code.WRONG_TYPE
        )
        return
    sources: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        here = (*place, index)
        said = _keys_of(item, draft, here)
        try:
            sources.append(_source(said, draft, here))
        except Unfit as error:
            draft.reject(here, item.get("path"), str(error), error.code)
            return
    draft.values[target] = merge_sources(sources)


def _keys_of(item: Mapping[str, Any], draft: Draft, place: Place) -> dict[str, Any]:
    """What a data set's keys say; a scratch draft keeps them from meeting those of the others."""
    scratch = Draft(draft.system, draft.file, draft.marks, draft.working_dir, draft.recipe_dir)
    enter(_KEYS, item, scratch, place)
    draft.lines += scratch.lines
    return {target.removeprefix("@"): value for target, value in scratch.values.items()}


def _source(said: dict[str, Any], draft: Draft, place: Place) -> dict[str, Any]:
    path = said.get("path")
    if not isinstance(path, str) or not path:
        raise Unfit("`path` names no data set", Code.MISSING_KEY)
    source = find_source(
        draft, path, files=said.get("data_files"), format_name=said.get("ds_type"), name=said.get("name"),
        split=said.get("split"), revision=said.get("revision"),
    )  # fmt: skip
    columns = _columns(said, draft, place)
    return {**source, **({"columns": columns} if columns else {})}


def _columns(said: dict[str, Any], draft: Draft, place: Place) -> dict[str, str]:
    """The columns of a data set's type; settles the kind of stage where the type decides it."""
    written = said.get("type")
    if not isinstance(written, str):
        what = "has no type: its rows are tokens already" if written is None else "describes its own prompts"
        raise Unfit(
            f"{what}; name the columns with `columns`, and `template: none` where prompts hold their own template"
        )
    style = written.partition(":")[0].partition(".")[0]
    if draft.get("loss.name") == "kto":
        return _judged(written)
    if draft.get(q.KIND) in ("reward", "preference") or style == "bradley_terry":
        return _pairs(said, written)
    if written in ("chat_template", "chat_template.default", "sharegpt"):
        return _messages(said)
    if written.startswith("alpaca"):
        return _alpaca(said, draft, place)
    if written in ("completion", "pretrain"):
        return _plain_text(said, draft)
    raise Unfit(
        f"type {written} is no layout that is known here: alpaca, chat_template, sharegpt, completion, pretrain"
    )


def _pairs(said: dict[str, Any], written: str) -> dict[str, str]:
    """Pairs: whole conversations or texts, or one message each after those of `field_messages`."""
    if written in ("chat_template", "chat_template.default"):
        content = _mapping(said).get("content", "content")
        answers = {name: f"{said.get(f'field_{name}', name)}.{content}" for name in ("chosen", "rejected")}
        return {"prompt": said.get("field_messages", "messages"), **answers}
    layout = written.rpartition(".")[2]
    if layout not in _PAIR_LAYOUTS:
        raise Unfit(f"type {written} is no layout of pairs that is known here: {', '.join(_PAIR_LAYOUTS)}")
    named = {name: said[f"field_{name}"] for name in ("prompt", "chosen", "rejected") if f"field_{name}" in said}
    return {**_PAIR_LAYOUTS[layout], **{name: own for name, own in named.items() if name != own}}


def _judged(written: str) -> dict[str, str]:
    """Single answers with a verdict, which is `label`."""
    layout = written.rpartition(".")[2]
    if layout not in _JUDGED_LAYOUTS:
        raise Unfit(f"type {written} is no layout of judged answers that is known here: {', '.join(_JUDGED_LAYOUTS)}")
    return _JUDGED_LAYOUTS[layout]


def _mapping(said: dict[str, Any]) -> dict[str, str]:
    """What a message calls its role and content."""
    mapping = dict(said.get("message_property_mappings") or {})
    return mapping | {
        key: said[f"message_field_{key}"] for key in ("role", "content") if f"message_field_{key}" in said
    }


def _messages(said: dict[str, Any]) -> dict[str, str]:
    mapping = _mapping(said)
    if mapping and not any(mapping.items() <= known.items() for known in _PLAIN_ROLES):
        raise Unfit("messages have role and content, or ShareGPT's from and value; other names are not read")
    column = said.get("field_messages", "messages")
    return {} if column == "messages" else {"messages": column}


def _alpaca(said: dict[str, Any], draft: Draft, place: Place) -> dict[str, str]:
    """Instruction, input and output; standard names are recognised, `system` and `history` with them."""
    message = "prompts are written by `template`, without Alpaca's sentence above them; the input follows a blank line"
    draft.note((*place, "type"), said["type"], changed(message))
    if not said.keys() & {"field_instruction", "field_input", "field_output"}:
        return {}
    prompt = "{" + said.get("field_instruction", "instruction") + "}"
    return {
        "prompt": prompt + "\n\n{" + said.get("field_input", "input") + "}",
        "completion": said.get("field_output", "output"),
    }


def _plain_text(said: dict[str, Any], draft: Draft) -> dict[str, str]:
    """Documents: pretraining, unless adapters are trained, which a `finetune` stage does on all tokens."""
    if draft.get(q.ADAPTER):
        draft.values["loss_on"] = "all"
    else:
        draft.values.setdefault(q.KIND, "pretrain")
    column = said.get("field") or said.get("text_column") or "text"
    return {} if column == "text" else {"text": column}
