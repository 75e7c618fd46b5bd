"""LLaMA-Factory's `dataset_info.json`: what the names in `dataset` and `eval_dataset` mean."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.convert.draft import Draft
from recipes.convert.readers import texts
from recipes.convert.rows import file_source, hub_source, merge_sources
from recipes.convert.rules import Place, Unfit, carried, changed
from recipes.nearest import nearest
from recipes.problem_codes import Code

INFO = "dataset_info.json"
DATASET_DIR = "@dataset_dir"
LIMIT = "@limit"
UNTIL = "@until"
"""When an epoch ends of data sets that take turns."""
SHARES = "@shares"
"""What each of them has of it."""
DOCUMENTS = "@documents"
"""Whether rows are documents, all of whose tokens are learnt."""
_TAGS = (
    {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"},
    {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
     "system_tag": "system"},
)  # fmt: skip
"""ShareGPT's names and OpenAI's, which are read as they are."""


def read_training(value: Any, draft: Draft, place: Place) -> None:
    """The rows to train on."""
    _read(value, draft, place, "data")


def read_evaluation(value: Any, draft: Draft, place: Place) -> None:
    """The rows to evaluate on."""
    _read(value, draft, place, "evaluation")


def _read(value: Any, draft: Draft, place: Place, target: str) -> None:
    try:
        names = texts(value)
        info, folder = _find_info(draft)
        merged = _mixed([_source(name, info, folder, draft, place) for name in names], draft, target)
    except Unfit as error:
        draft.reject(place, value, str(error), error.code)
        return
    draft.note(place, value, carried(target, lambda _: merged))
    if "limit" in merged and len(names) > 1:
        draft.comments[target] = f"limit: max_samples of each of {len(names)} data sets, drawn from all of them"


def _mixed(sources: list[dict[str, Any]], draft: Draft, target: str) -> dict[str, Any]:
    """The sources as one; rows to evaluate on come once each, however those to train on take turns."""
    until = draft.get(UNTIL)
    if until is None or target == "evaluation" or len(sources) == 1:
        return merge_sources(sources)
    weights = draft.get(SHARES, [1.0] * len(sources))
    if len(weights) != len(sources):
        message = f"interleave_probs has {len(weights)} numbers for {len(sources)} data sets; give one for each"
        raise Unfit(message, Code.WRONG_LENGTH)
    weighted = [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)]
    return {"mix": weighted, "until": until}


def _find_info(draft: Draft) -> tuple[Mapping[str, Any], Path]:
    """What the file of data sets says, and its folder."""
    written = draft.get(DATASET_DIR, "data")
    if written.startswith("REMOTE:") or written == "ONLINE":
        raise Unfit(f"dataset_dir {written} is on the hub; download it and name the folder")
    folders = draft.places(written)
    folder = next((folder for folder in folders if (folder / INFO).is_file()), None)
    if folder is None:
        message = f"{INFO} is not in {folders[0]}; --folder names the folder in which LLaMA-Factory is run"
        raise Unfit(message, Code.MISSING_FILE)
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unfit(f"{folder / INFO} is not valid JSON: {error}", Code.INVALID_YAML) from None
    if not isinstance(info, dict):
        raise Unfit(f"{folder / INFO} must map names to data sets", Code.WRONG_TYPE)
    return info, folder


def _source(name: str, info: Mapping[str, Any], folder: Path, draft: Draft, place: Place) -> dict[str, Any]:
    said = info.get(name)
    if not isinstance(said, dict):
        guess = nearest(name, list(info))
        hint = f"; did you mean {guess}?" if guess else ""
        raise Unfit(f"{INFO} has no data set {name}{hint}", Code.UNKNOWN_CHOICE)
    if isinstance(said.get("hf_hub_url"), str):
        source = hub_source(said["hf_hub_url"], name=said.get("subset"), split=said.get("split"))
    elif isinstance(said.get("file_name"), str):
        source = file_source(draft, _files(folder / said["file_name"], draft.working_dir))
    else:
        keys = ", ".join(said) or "nothing"
        raise Unfit(f"data set {name} is neither a file nor on the Hugging Face hub; {INFO} has {keys}")
    columns = _columns(name, said, draft, place)
    limit = said.get("num_samples") or draft.get(LIMIT)
    return {**source, **({"columns": columns} if columns else {}), **({"limit": limit} if limit else {})}


def _files(path: Path, working_dir: Path) -> list[str]:
    """A file, or those of a folder, from the working folder on."""
    inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [os.path.relpath(file, working_dir) for file in inside if not file.name.startswith(".")]


def _columns(name: str, said: Mapping[str, Any], draft: Draft, place: Place) -> dict[str, str]:
    columns = said.get("columns", {})
    if unread := sorted(columns.keys() & {"videos", "audios"}):
        raise Unfit(f"data set {name} has {' and '.join(unread)}, which no model here reads")
    if said.get("formatting", "alpaca") == "alpaca":
        found = _alpaca(name, said, columns, draft, place)
    else:
        found = _chats(name, said, columns, draft, place)
    if "images" in columns:
        found["images"] = columns["images"]
    return {column: own for column, own in found.items() if column != own}


def _alpaca(
    name: str, said: Mapping[str, Any], columns: Mapping[str, str], draft: Draft, place: Place
) -> dict[str, str]:
    prompt = columns.get("prompt", "instruction")
    if draft.get(DOCUMENTS):
        return {"text": prompt}
    query = columns.get("query", None if columns else "input")
    prompt = prompt if query is None else "{" + prompt + "}\n{" + query + "}"
    if unread := [columns[key] for key in ("history", "system", "tools") if key in columns]:
        _differs(draft, place, name, f"columns that are not read: {', '.join(unread)}")
    if said.get("ranking"):
        answers = {key: columns.get(key, key) for key in ("chosen", "rejected")}
        return {"prompt": prompt, **answers}
    return {"prompt": prompt, "completion": columns.get("response", "output"), **_verdict(columns, draft)}


def _chats(
    name: str, said: Mapping[str, Any], columns: Mapping[str, str], draft: Draft, place: Place
) -> dict[str, str]:
    tags = said.get("tags", {})
    if tags and not any(all(known.get(key, value) == value for key, value in tags.items()) for known in _TAGS):
        raise Unfit(f"data set {name}: messages have role and content, or ShareGPT's from and value")
    if "tools" in columns:
        _differs(draft, place, name, f"column that is not read: {columns['tools']}")
    messages = columns.get("messages", "conversations")
    if said.get("ranking"):  # an answer is one message there
        content = tags.get("content_tag", "value")
        answers = {key: f"{columns.get(key, key)}.{content}" for key in ("chosen", "rejected")}
        return {"prompt": messages, **answers}
    return {"messages": messages, **_verdict(columns, draft)}


def _verdict(columns: Mapping[str, str], draft: Draft) -> dict[str, str]:
    """The column that says whether an answer is desirable, which `stage: kto` alone reads."""
    return {"label": columns["kto_tag"]} if draft.get("loss.name") == "kto" and "kto_tag" in columns else {}


def _differs(draft: Draft, place: Place, name: str, reason: str) -> None:
    draft.note((*place, name), None, changed(reason))
