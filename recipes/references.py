"""The grammar of references: names of stages, store addresses, local folders and hub ids (pure)."""

import re
from dataclasses import dataclass

_NAME = r"[a-z][a-z0-9_-]{0,62}"
_STAGE = re.compile(rf"({_NAME})(?:\.([a-z_]+))?")
_STORE = re.compile(rf"store://([0-9a-f]{{8,64}}|{_NAME})(?:\.([a-z_]+))?")
_HUB = re.compile(r"hf://([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([A-Za-z0-9][\w.-]*))?")


@dataclass(frozen=True, slots=True)
class StageRef:
    """Another stage of the same recipe, or one part of what it makes."""

    stage: str
    part: str | None = None


@dataclass(frozen=True, slots=True)
class StoreRef:
    """An artifact of the store by its given name or by (a prefix of) its fingerprint."""

    name_or_fingerprint: str
    part: str | None = None


@dataclass(frozen=True, slots=True)
class FolderRef:
    """A local folder in the Hugging Face layout; relative paths start at the recipe's folder."""

    path: str


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model of the Hugging Face hub at one revision."""

    repo: str
    revision: str


Reference = StageRef | StoreRef | FolderRef | HubRef


def parse_reference(text: str) -> Reference:
    """Read a reference; raises ValueError naming what is wrong with it."""
    if "\x00" in text or text != text.strip() or not text:
        raise ValueError("a reference is a stage name, store://NAME, hf://ORG/NAME@REVISION or a folder")
    if text.startswith("store://"):
        match = _STORE.fullmatch(text)
        if match is None:
            raise ValueError(
                "a store address is store://NAME or store://FINGERPRINT (at least 8 hex digits), then .PART"
            )
        return StoreRef(match.group(1), match.group(2))
    if text.startswith("hf://"):
        match = _HUB.fullmatch(text)
        if match is None:
            raise ValueError("a hub id is hf://ORG/NAME@REVISION")
        if match.group(2) is None:
            raise ValueError(f"a hub id needs its revision, for example {text}@main")
        return HubRef(match.group(1), match.group(2))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        raise ValueError(f"unknown scheme {text.split(':')[0]!r}; known are store:// and hf://")
    if text.startswith("~"):
        raise ValueError("'~' is not expanded in recipes; write the whole path")
    if "/" in text or text in (".", ".."):
        return FolderRef(text)
    match = _STAGE.fullmatch(text)
    if match is None:
        raise ValueError(
            "not a stage name (lower case letters, digits, _ and -); a local folder needs a '/', as in ./model"
        )
    return StageRef(match.group(1), match.group(2))
