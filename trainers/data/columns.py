"""TRL's standard columns, plain or conversational, checked and brought into one form per role."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.row_images import find_images

RowRole = Literal["text", "labels", "instructions", "image_text", "seq2seq", "preferences", "prompts"]
"""What rows are read for: language modelling, classification, instruction tuning without or with images, source to
target, reward modelling, or generation."""
Role = RowRole | Literal["images"]
"""What a source is read for: rows of text, or images."""

STANDARD = ("text", "label", "messages", "prompt", "completion", "chosen", "rejected")
_CONVERSATION_KEYS = {"conversations": "messages"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}

Text = str | list[dict[str, Any]]
"""Plain text, or messages."""

SPLIT = "split"
"""True in a pair of plain texts whose prompt is their common beginning, for lack of a column."""


FORMS: dict[RowRole, tuple[tuple[str, ...], ...]] = {
    "text": (("text",), ("prompt", "completion")),
    "labels": (("text",),),
    "instructions": (("messages",), ("prompt", "completion"), ("text",)),
    "image_text": (("messages",), ("prompt", "completion")),
    "seq2seq": (("messages",), ("prompt", "completion")),
    "preferences": (("chosen", "rejected"),),
    "prompts": (("prompt",), ("messages",)),
}
"""Standard columns of each role: one of the alternatives must be there."""


_NAME_IMAGES: tuple[RowRole, ...] = ("instructions", "image_text")
"""Roles in which images that a row names count."""


class BadRow(ValueError):  # noqa: N818
    """A row that does not have the form that its role needs; says what is wrong and what would be right."""

    def __init__(self, message: str, suggestion: str = "", code: Code = Code.WRONG_CELL_TYPE) -> None:
        super().__init__(message)
        self.code = code
        self.suggestion = suggestion


def canonical(row: Mapping[str, Any], role: RowRole, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row in its role's form, from TRL's columns; `columns` maps a standard name to the row's own.

    text: {text}; of a plain prompt and completion {text, prompt}, one below the other. labels: {text, label}; a label
    that is missing or None is unknown. instructions: {messages}, {prompt, completion} or {text}. image-text: {messages,
    images} with every content a list of parts {type: text, text} and {type: image}, or {prompt, completion, images};
    images are as the row names them. seq2seq: {prompt, completion}, the completion plain text; of messages the last
    turn, which is the assistant's. preferences: {prompt, chosen, rejected}; without a prompt it is the common beginning
    of both, and `split` is True where they are plain text. prompts: {prompt, reference}. Raises BadRow.
    """
    found = _rename(row, columns)
    try:
        return _in_form(found, role, find_images(row, columns) if role in _NAME_IMAGES else None)
    except BadRow:
        if any(found.keys() >= set(form) for form in FORMS[role]):
            raise
    needed = " or ".join(" and ".join(form) for form in FORMS[role])
    raise BadRow(f"needs {needed}", f"{_there(row)}; map them with `columns`", Code.MISSING_COLUMN)


def _in_form(found: Mapping[str, Any], role: RowRole, images: list[Any] | None) -> dict[str, Any]:
    """Bring a row of standard columns into its role's form; `images` are those that it names."""
    match role:
        case "text":
            if "text" not in found and {"prompt", "completion"} <= found.keys():
                prompt = _plain(found, "prompt")
                return {"text": f"{prompt}\n{_plain(found, 'completion')}", "prompt": prompt}
            return {"text": _plain(found, "text")}
        case "labels":
            return {"text": _plain(found, "text"), "label": _label(found.get("label"))}
        case "instructions":
            if images:
                raise BadRow(
                    "the row has an image, but the model takes text alone",
                    "start from a vision-language model (llava), or take the column out of the file",
                    Code.UNEXPECTED_IMAGES,
                )
            return _instruction(found)
        case "seq2seq":
            return _source_and_target(found)
        case "image_text":
            return _image_text(found, images)
        case "preferences":
            return _preference(found)
        case "prompts":
            return _prompt(found)


def is_conversational(value: Any) -> bool:
    """Tell whether a column holds messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def extract_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Split the common beginning off two texts or two conversations, as TRL does: (prompt, chosen, rejected).

    In plain text a space before the difference goes to the answers. The last item never counts as common.
    """
    shorter = min(len(chosen), len(rejected))
    index = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    if index and index < shorter and chosen[index] != rejected[index] and chosen[index - 1] == " ":
        index -= 1
    return chosen[:index], chosen[index:], rejected[index:]


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    found = {name: row[name] for name in STANDARD if row.get(name) is not None}
    for own, name in _CONVERSATION_KEYS.items():
        if own in row and name not in found:
            found[name] = row[own]
    for name, own in columns.items():
        if own not in row:
            guess = nearest(own, [str(there) for there in row])
            suggestion = f"did you mean {guess}?" if guess else _there(row)
            raise BadRow(f"no column {own!r} (mapped to {name})", suggestion, Code.MISSING_COLUMN)
        found[name] = row[own]
    return found


def _there(row: Mapping[str, Any]) -> str:
    return "columns there: " + (", ".join(str(name) for name in list(row)[:12]) or "none")


def _plain(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        what = "is missing" if name not in row else f"is {type(value).__name__}, not text"
        raise BadRow(f"column {name!r} {what}")
    return value


def _label(value: Any) -> str | None:
    """Read a class: text, a whole number, true or false."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int) and not getattr(value, "is_integer", lambda: False)():
        raise BadRow(f"column 'label' is {type(value).__name__}, not text or a whole number")
    return str(int(value)) if isinstance(value, float) else str(value)


def _text(row: Mapping[str, Any], name: str) -> Text:
    """Read a column that holds text or messages."""
    value = row.get(name)
    if value is not None and not isinstance(value, str | list):
        raise BadRow(f"column {name!r} is {type(value).__name__}, not text or a list of messages")
    return value if isinstance(value, str) else _messages(row, name)


def _messages(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        what = "is missing" if name not in row else f"is {type(value).__name__}, not a list of messages"
        raise BadRow(f"column {name!r} {what if value != [] else 'has no message'}")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, place: str) -> dict[str, Any]:
    """Check one message; ShareGPT's from/value is read too, and lists of text parts are joined."""
    if not isinstance(item, Mapping):
        raise BadRow(f"{place} is {type(item).__name__}, not a message")
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "role" not in message:
        sender = message.pop("from")
        message = {"role": _SHAREGPT_ROLES.get(sender, sender), "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content", "")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{place} has no role")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) != len(parts):
            raise BadRow(f"{place} has content other than text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRow(f"{place} has content of type {type(content).__name__}, not text")
    if not content and set(message) <= {"role", "content"}:
        raise BadRow(f"{place} has no content")
    return {**message, "content": content}


def _instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return {"messages": _messages(row, "messages")}
    if "prompt" in row or "completion" in row:
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return {"prompt": prompt, "completion": _same_form(prompt, completion, "completion")}
    return {"text": _plain(row, "text")}


def _source_and_target(row: Mapping[str, Any]) -> dict[str, Any]:
    found = _instruction(row)
    if "text" in found:
        raise BadRow("a text alone has no target")
    messages = found.get("messages")
    if messages is None and isinstance(found["completion"], str):
        return found
    turns = messages or [*found["prompt"], *found["completion"]]
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise BadRow("its last message must be the assistant's, after another")
    return {"prompt": turns[:-1], "completion": turns[-1]["content"]}


def _image_text(row: Mapping[str, Any], images: list[Any] | None) -> dict[str, Any]:
    if images is None:
        raise BadRow(
            "no column 'images' or 'image'",
            "map it with `columns`; a row without an image says so by `images: []`",
            Code.MISSING_COLUMN,
        )
    if "messages" in row:
        return {"messages": _message_parts(row, "messages"), "images": images}
    found: dict[str, Any] = {
        name: row[name] if isinstance(row.get(name), str) else _message_parts(row, name)
        for name in ("prompt", "completion")
    }
    completion = found["completion"]
    if isinstance(completion, str) and not isinstance(found["prompt"], str):
        completion = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    found["completion"] = _same_form(found["prompt"], completion, "completion")
    return {**found, "images": images}


def _message_parts(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Read messages whose contents become lists of parts; an image leaves only its place."""
    value = row.get(name)
    turns = value if isinstance(value, list) else []
    parts = [_parts(turn.get("content"), f"{name}[{index}]") for index, turn in enumerate(turns) if _is_listed(turn)]
    listed = iter(parts)
    plain = [{**turn, "content": "x"} if _is_listed(turn) else turn for turn in turns]
    messages = _messages({name: plain} if isinstance(value, list) else row, name)
    return [
        {**message, "content": next(listed) if _is_listed(turn) else [{"type": "text", "text": message["content"]}]}
        for message, turn in zip(messages, turns, strict=True)
    ]


def _is_listed(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("content"), list)


def _parts(content: list[Any], place: str) -> list[dict[str, str]]:
    if not content:
        raise BadRow(f"{place} has no content")
    parts: list[dict[str, str]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type") == "image":
            parts.append({"type": "image"})
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadRow(f"{place} has a part that is neither text nor an image")
    return parts


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("'chosen' and 'rejected' must both be text or both be messages")
    if "prompt" not in row:
        prompt, answer, other = extract_prompt(chosen, rejected)
        found = {"prompt": prompt, "chosen": answer, "rejected": other}
        return {**found, SPLIT: True} if isinstance(chosen, str) else found
    prompt = _text(row, "prompt")
    return {
        "prompt": prompt,
        "chosen": _same_form(prompt, chosen, "chosen"),
        "rejected": _same_form(prompt, rejected, "rejected"),
    }


def _same_form(prompt: Text, answer: Text, name: str) -> Text:
    """Bring an answer into its prompt's form; plain text after messages is the assistant's turn."""
    if isinstance(prompt, str) == isinstance(answer, str):
        return answer[len(prompt) :] if _repeats(prompt, answer) else answer
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    raise BadRow(f"'prompt' is text but {name!r} holds messages")


def _repeats(prompt: Text, answer: Text) -> bool:
    """Tell whether a conversation starts with its whole prompt again, as some data sets write it."""
    return isinstance(answer, list) and len(answer) > len(prompt) > 0 and answer[: len(prompt)] == prompt


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    if "prompt" in row:
        prompt = _text(row, "prompt")
        reference = row.get("reference", row.get("completion"))
        return {"prompt": prompt, "reference": reference if isinstance(reference, str) else None}
    messages = _messages(row, "messages")
    reference = None
    while messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
    if not messages:
        raise BadRow("'messages' has no turn before the assistant's")
    return {"prompt": messages, "reference": reference}
