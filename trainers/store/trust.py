"""Who may have written what lies in a store's folder; what others may have written is not read.

A ref decides what a run continues from, so its writer decides what is trained. Trusted are this user, root and
the owner of the store's folder; a folder that its group may write is shared with that group on purpose. What every user
may write, links and special files are refused, whoever owns them.
"""

import os
import pwd
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import CapacityError

TRUST_VARIABLE = "TRAINWRIGHT_TRUST_STORE"
"""Folders (absolute, separated as in PATH) whose owners and modes are not looked at: where they mean nothing."""

ROOT_USER = 0


class StoreUntrusted(CapacityError):  # noqa: N818
    """Somebody else may have written what the store holds, or it leads out of the store; the message names the file."""


@dataclass(frozen=True)
class Status:
    """What decides about a file: its type and permissions (as in `stat`), its owner and its group."""

    mode: int
    owner: int
    group: int

    @staticmethod
    def of(found: os.stat_result) -> "Status":
        """Return the part of a stat result that counts."""
        return Status(found.st_mode, found.st_uid, found.st_gid)


@dataclass(frozen=True)
class User:
    """Who asks."""

    uid: int
    groups: frozenset[int]

    @staticmethod
    def present() -> "User":
        """Return the user of this process."""
        return User(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


@dataclass(frozen=True)
class Trust:
    """Whose files are read; None for `owners`: anybody's, as the folder is shared or was declared trusted."""

    owners: Collection[int] | None
    judges_modes: bool = True


def judge_store(folder: Status, user: User) -> Trust | str:
    """Return whom a store in this folder makes us trust, or why it is not to be used."""
    if folder.mode & stat.S_IWOTH:
        return f"every user may write in it ({_octal(folder.mode)})"
    is_shared = bool(folder.mode & stat.S_IWGRP)
    if folder.owner not in (user.uid, ROOT_USER) and not (is_shared and folder.group in user.groups):
        return f"it belongs to {_name(folder.owner)}, and you are {_name(user.uid)}"
    return Trust(None if is_shared else frozenset({user.uid, ROOT_USER, folder.owner}))


def judge_entry(entry: Status, trust: Trust) -> str | None:
    """Say why a file or folder inside a store is not to be used; None: it may."""
    if stat.S_ISLNK(entry.mode):
        return "it is a link; a store holds none"
    if not (stat.S_ISREG(entry.mode) or stat.S_ISDIR(entry.mode)):
        return "it is neither a file nor a folder"
    if trust.judges_modes and entry.mode & stat.S_IWOTH:
        return f"every user may write it ({_octal(entry.mode)})"
    if trust.owners is not None and entry.owner not in trust.owners:
        return f"it belongs to {_name(entry.owner)}, who is neither you nor the store's owner"
    return None


def trust_of(root: Path) -> Trust:
    """Look at a store's folder, which is there; raises StoreUntrusted when it is not to be used."""
    declared = os.environ.get(TRUST_VARIABLE, "").split(os.pathsep)
    if str(root) in declared:
        return Trust(None, judges_modes=False)
    judged = judge_store(Status.of(os.stat(root)), User.present())
    if isinstance(judged, Trust):
        return judged
    raise StoreUntrusted(
        f"store {root} is not used: {judged}. Use a folder of your own (a new one inside it will do), let a common "
        f"group write it (chmod g+ws,o-w), or, if nobody else can reach it, set {TRUST_VARIABLE}={root}"
    )


def check_path(root: Path, path: str) -> None:
    """Raise StoreUntrusted unless a path of the store, as far as it is there, leads through trusted folders only."""
    try:
        trust = trust_of(root)
    except (FileNotFoundError, NotADirectoryError):
        return
    place = str(root)
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise StoreUntrusted(f"store {root}: {path!r} leads out of the store")
        place = f"{place}/{part}"
        try:
            found = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return
        problem = judge_entry(Status.of(found), trust)
        if problem is not None:
            raise StoreUntrusted(f"store {root}: {place[len(str(root)) + 1 :]} is not read: {problem}")


def _octal(mode: int) -> str:
    return f"mode {stat.S_IMODE(mode):04o}"


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"
