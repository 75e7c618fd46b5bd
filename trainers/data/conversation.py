"""Rows of plain text as conversations: the prompt is the user's turn, the completion or an answer the assistant's."""

from collections.abc import Mapping
from typing import Any

from recipes.errors import RequestError
from trainers.data.messages import with_system
from trainers.data.published import MARK
from trainers.data.row_forms import SPLIT, extract_prompt

Turns = list[dict[str, Any]]

_ROLES = {"Human": "user", "Assistant": "assistant"}


def as_conversation(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's columns with plain text as messages; rows of messages or of one text are returned as they are.

    A text in the form of Anthropic's HH-RLHF ("\\n\\nHuman: ...\\n\\nAssistant: ...") becomes the turns that it marks.
    Raises RequestError for a pair without a prompt whose texts mark no turns: where the answers start is not known.
    """
    found = dict(columns)
    prompt, system = found.get("prompt"), found.pop("system", "")
    if not isinstance(prompt, str):
        return found
    found = _in_turns(found, prompt)
    found["prompt"] = with_system(found["prompt"], system)
    return found


def _in_turns(found: dict[str, Any], prompt: str) -> dict[str, Any]:
    if isinstance(found.get("chosen"), str):
        return _pair(found)
    found.pop(SPLIT, None)
    found["prompt"] = turns(prompt)
    if isinstance(found.get("completion"), str):
        found["completion"] = _assistant(found["completion"])
        if "images" in found:
            for name in ("prompt", "completion"):
                found[name] = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in found[name]]
    else:
        while found["prompt"] and found["prompt"][-1]["role"] == "assistant":
            answer = found["prompt"].pop()["content"]
            found["reference"] = found.get("reference") or answer
    return found


def after_system(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Put a row's system prompt before its plain prompt, a blank line between them."""
    found = dict(columns)
    found["prompt"] = f"{found.pop('system')}\n\n{found['prompt']}"
    return found


def turns(text: str) -> Turns:
    """Return the messages of a prompt: those that it marks, else one of the user; none for an empty text."""
    if not MARK.match(text):
        return [{"role": "user", "content": text}] if text else []
    _, *pieces = MARK.split(text)
    marked = [
        {"role": _ROLES[mark], "content": content.strip()}
        for mark, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    while marked and not marked[-1]["content"]:  # "Assistant:" that waits for its answer
        marked.pop()
    return marked


def _assistant(text: str) -> Turns:
    return [{"role": "assistant", "content": text}]


def _pair(columns: dict[str, Any]) -> dict[str, Any]:
    prompt = columns["prompt"]
    sides = [columns[side] for side in ("chosen", "rejected")]
    if columns.pop(SPLIT, False):
        if not all(MARK.match(prompt + side) for side in sides):
            raise RequestError(
                "'chosen' and 'rejected' are plain text without a 'prompt', so it is not known where the assistant's "
                "turn starts; give a prompt column or messages, or set template: none"
            )
        prompt, *answers = extract_prompt(*(turns(prompt + side) for side in sides))
        return {**columns, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    return {**columns, "prompt": turns(prompt), "chosen": _assistant(sides[0]), "rejected": _assistant(sides[1])}
