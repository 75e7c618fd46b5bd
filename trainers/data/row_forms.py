"""The form of rows of each role, made of standard columns (pure)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from recipes.problem_codes import Code
from recipes.stages.answers import SourceUse
from trainers.data.bad_row import BadRow
from trainers.data.message_parts import read_parts
from trainers.data.messages import Messages, read_messages

RowRole = Literal[
    "text", "labels", "instructions", "image_text", "seq2seq", "preferences", "judged", "prompts", "cases"
]
"""What rows are read for: language modelling, classification, instruction tuning without or with images, source to
target, pairs of answers, single answers with a verdict, or generation."""
Role = RowRole | Literal["images"]
"""What a source is read for: rows of text, or images."""

Text = str | Messages
"""Plain text, or messages."""

SPLIT = "split"
"""True in a pair of plain texts whose prompt is their common beginning, for lack of a column."""


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


def plain(row: Mapping[str, Any], name: str) -> str:
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


def _messages(row: Mapping[str, Any], name: str) -> Messages:
    if name not in row:
        raise BadRow(f"column {name!r} is missing")
    return read_messages(row[name], name)


def _instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return {"messages": _messages(row, "messages")}
    if "prompt" in row or "completion" in row:
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return {"prompt": prompt, "completion": _same_form(prompt, completion, "completion")}
    return {"text": plain(row, "text")}


def _source_and_target(row: Mapping[str, Any]) -> dict[str, Any]:
    found = _instruction(row)
    if "text" in found:
        raise BadRow("a text alone has no target")
    messages = found.get("messages")
    if messages is None and isinstance(found["completion"], str):
        return found
    turns = messages or [*found["prompt"], *found["completion"]]
    _last_answers(turns)
    return {"prompt": turns[:-1], "completion": turns[-1]["content"]}


def _last_answers(turns: Messages) -> None:
    """Raise BadRow where the last turn is no answer to another."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadRow("its last message must be the assistant's, after another")


def _image_text(row: Mapping[str, Any], images: list[Any] | None) -> dict[str, Any]:
    if images is None:
        raise BadRow(
            "no column 'images' or 'image'",
            "map it with `columns`; a row without an image says so by `images: []`",
            Code.MISSING_COLUMN,
        )
    if "messages" in row:
        return {"messages": read_parts(row.get("messages"), "messages"), "images": images}
    found: dict[str, Any] = {
        name: row[name] if isinstance(row.get(name), str) else read_parts(row.get(name), name)
        for name in ("prompt", "completion")
    }
    completion = found["completion"]
    if isinstance(completion, str) and not isinstance(found["prompt"], str):
        completion = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    found["completion"] = _same_form(found["prompt"], completion, "completion")
    return {**found, "images": images}


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("'chosen' and 'rejected' must both be text or both be messages")
    if "prompt" not in row:
        prompt, answer, other = extract_prompt(chosen, rejected)
        found = {"prompt": prompt, "chosen": answer, "rejected": other}
        return {**found, SPLIT: True} if isinstance(chosen, str) else found
    prompt = _text(row, "prompt")
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        return _after_text(prompt, chosen, rejected)
    return {
        "prompt": prompt,
        "chosen": _same_form(prompt, chosen, "chosen"),
        "rejected": _same_form(prompt, rejected, "rejected"),
    }


def _judged(row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in row and "completion" not in row:
        turns = _messages(row, "messages")
        _last_answers(turns)
        return {"prompt": turns[:-1], "completion": turns[-1:], "label": _verdict(row)}
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    return {"prompt": prompt, "completion": _same_form(prompt, completion, "completion"), "label": _verdict(row)}


def _verdict(row: Mapping[str, Any]) -> bool:
    """Read whether an answer is desirable: true or false, 1 or 0, or the same in letters."""
    value = row.get("label")
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    verdict = known.get(str(value).strip().lower())
    if verdict is None:
        message = "column 'label' is missing" if value is None else f"column 'label' is {value!r}, not true or false"
        raise BadRow(message, "true where the completion is desirable, false where it is not")
    return verdict


def _after_text(prompt: str, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """Read answers in messages after a prompt of plain text, which they repeat (binarized UltraFeedback) or not."""
    if all(turn["role"] == "assistant" for turn in (*chosen, *rejected)):
        return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
    asked, answer, other = extract_prompt(chosen, rejected)
    if not any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in asked):
        raise BadRow("'prompt' is text that is not a user's turn of both 'chosen' and 'rejected'")
    return {"prompt": asked, "chosen": answer, "rejected": other}


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


def _plain_text(row: Mapping[str, Any]) -> dict[str, Any]:
    if "text" not in row and {"prompt", "completion"} <= row.keys():
        prompt = plain(row, "prompt")
        return {"text": f"{prompt}\n{plain(row, 'completion')}", "prompt": prompt}
    return {"text": plain(row, "text")}


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": plain(row, "text"), "label": _label(row.get("label"))}


def _instruction_alone(row: Mapping[str, Any], images: list[Any] | None) -> dict[str, Any]:
    if images:
        raise BadRow(
            "the row has an image, but the model takes text alone",
            "start from a vision-language model (llava), or take the column out of the file",
            Code.UNEXPECTED_IMAGES,
        )
    return _instruction(row)


InForm = Callable[[Mapping[str, Any], list[Any] | None], dict[str, Any]]


def _of_text(read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> InForm:
    return lambda row, images: read(row)


@dataclass(frozen=True, slots=True)
class RowForm:
    """What the rows of a role are made of."""

    columns: tuple[tuple[str, ...], ...]
    """Standard columns: one of the alternatives must be there."""
    read: InForm
    """Brings a row of standard columns into the form, with the images that it names."""
    published: tuple[str, ...] = ()
    """What published forms have to give; empty: none is known."""
    has_asides: bool = False
    """Whether a system prompt and descriptions of tools count."""
    names_images: bool = False
    """Whether images that a row names count."""
    opens_images: bool = False
    """Whether they become part of the row."""
    has_weights: bool = False
    """Whether a turn may have a weight."""
    keeps_columns: bool = False
    """Whether the row's own columns are at hand next to those of the form."""


_ANSWERED = ("prompt", "completion")
_PAIR = ("chosen", "rejected")
ROW_FORMS: dict[RowRole, RowForm] = {
    "text": RowForm((("text",), _ANSWERED), _of_text(_plain_text), _ANSWERED),
    "labels": RowForm((("text",),), _of_text(_labelled)),
    "instructions": RowForm(
        (("messages",), _ANSWERED, ("text",)),
        _instruction_alone,
        _ANSWERED,
        has_asides=True,
        names_images=True,
        has_weights=True,
    ),
    "image_text": RowForm(
        (("messages",), _ANSWERED), _image_text, names_images=True, opens_images=True, has_weights=True
    ),
    "seq2seq": RowForm((("messages",), _ANSWERED), _of_text(_source_and_target), _ANSWERED, has_asides=True),
    "preferences": RowForm((_PAIR,), _of_text(_preference), _PAIR, has_asides=True),
    "judged": RowForm(((*_ANSWERED, "label"), ("messages", "label")), _of_text(_judged), has_asides=True),
    "prompts": RowForm((("prompt",), ("messages",)), _of_text(_prompt), _ANSWERED, has_asides=True, keeps_columns=True),
    "cases": RowForm((), _of_text(dict)),  # a benchmark's rows keep their own columns
}


def row_role(use: SourceUse) -> RowRole:
    """Return what the rows of a use of text are read for."""
    assert not use.facts.is_images, f"{use.field_path} is a source of images"
    return cast(RowRole, use.role)


def opens_images(roles: Sequence[RowRole]) -> bool:
    """Tell whether rows have images, whichever of the roles theirs is."""
    return all(ROW_FORMS[role].opens_images for role in roles)
