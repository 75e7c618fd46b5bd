"""Messages of conversations, checked and brought into one form: `role`, `content`, and keys for a chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainers.data.bad_row import BadRow

Messages = list[dict[str, Any]]

EMPTY_TURN = "empty_turn"
"""Why a row is left out: the user or the assistant says nothing."""
SENDERS = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "claude": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""Roles of ShareGPT's senders, in small letters."""
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
"""Roles that chat templates know; others may be a template's own."""
WEIGHT_KEYS = ("weight", "train", "loss")
"""Keys of a turn that say whether it is learnt: OpenAI's, axolotl's and ms-swift's."""


def read_messages(value: Any, name: str) -> Messages:
    """Check a column of messages; raises BadRow naming the turn."""
    if not isinstance(value, list) or not value:
        what = "has no message" if value == [] else f"is {type(value).__name__}, not a list of messages"
        raise BadRow(f"column {name!r} {what}")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def read_tools(value: Any) -> list[Any]:
    """Read the descriptions of tools: a list, or JSON of one, as published sets have it. Raises BadRow."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise BadRow(f"column 'tools' is text that is not JSON ({error})") from None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"column 'tools' is {type(value).__name__}, not a list of descriptions of tools")
    return [without_nulls(tool) for tool in value]


def with_system(messages: Messages, system: str) -> Messages:
    """Return the messages after a system prompt, unless they have one."""
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def has_empty_turn(turns: Any) -> bool:
    """Tell whether the user or the assistant of some messages says nothing; a system prompt may be empty."""
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping)
        and turn.get("role") not in (None, "system")
        and _is_blank(turn["content"])
        and turn.keys() <= {"role", "content", *WEIGHT_KEYS}
        for turn in turns
    )


def _is_blank(content: Any) -> bool:
    if isinstance(content, list):
        return all(part["type"] == "text" and not part["text"].strip() for part in content)
    return not content.strip()


def without_nulls(value: Any) -> Any:
    """Return a value without keys that hold null: tables write them for what other rows have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def other_keys(messages: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys of messages besides role and content: only a chat template can read them."""
    return {key for message in messages for key in message} - {"role", "content"}


def _message(item: Any, place: str) -> dict[str, Any]:
    """Check one message; ShareGPT's from/value is read too, and lists of text parts are joined."""
    if not isinstance(item, Mapping):
        raise BadRow(f"{place} is {type(item).__name__}, not a message")
    message = without_nulls(item)
    if "from" in message and "role" not in message:
        message = _sent(message, place)
    role, content = message.get("role"), message.get("content", "")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{place} has no role")
    if not {"content", "value"} & item.keys() and message.keys() <= {"role", *WEIGHT_KEYS}:
        raise BadRow(f"{place} has no content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) != len(parts):
            raise BadRow(f"{place} has content other than text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRow(f"{place} has content of type {type(content).__name__}, not text")
    return {**_weighed(message, place), "content": content}


def _sent(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Bring ShareGPT's `from` and `value` into role and content; a function call becomes a tool call."""
    sender, value = message.pop("from"), message.pop("value", None)
    role = SENDERS.get(sender.lower()) if isinstance(sender, str) else None
    if role is None:
        raise BadRow(f"{place} is from {sender!r}", f"senders that are read: {', '.join(SENDERS)}")
    if sender.lower() == "function_call" and (calls := _calls(value)):
        return {"role": role, "content": "", "tool_calls": calls, **message}
    return {"role": role, "content": "" if value is None else value, **message}


def _calls(value: Any) -> list[dict[str, Any]]:
    """Read calls of functions from their JSON; none of other text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _weighed(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Bring whether a turn is learnt into the key `weight`, which is 0 or not there."""
    found = {key: message[key] for key in WEIGHT_KEYS if key in message}
    for key, value in found.items():
        if value not in (0, 1):
            raise BadRow(f"{place} has {key} {value!r}", "a turn is learnt (1, true) or not (0, false)")
    rest = {key: value for key, value in message.items() if key not in found}
    return {**rest, "weight": 0} if 0 in found.values() else rest
