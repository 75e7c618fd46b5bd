"""What a sandbox needs of the Linux kernel, by system calls: namespaces, mounts, Landlock, seccomp. Standard library
alone: the module is imported by a fresh interpreter that sees nothing else.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
EPERM, ENOSYS = 1, 38

NUMBERS = {
    "x86_64": {
        "audit": 0xC000003E, "clone": 56, "capset": 126, "pivot_root": 155, "umount2": 166,
        "denied": (29, 41, 59, 64, 68, 101, 135, 155, 161, 165, 166, 240, 248, 249, 250, 272, 298, 303, 304, 308, 310,
                   311, 319, 321, 322, 323),
    },
    "aarch64": {
        "audit": 0xC00000B7, "clone": 220, "capset": 91, "pivot_root": 41, "umount2": 39,
        "denied": (39, 40, 41, 51, 92, 97, 117, 180, 186, 190, 194, 198, 217, 218, 219, 221, 241, 264, 265, 268, 270,
                   271, 279, 280, 281, 282),
    },
}  # fmt: skip
"""System calls by machine. Denied: socket, execve, execveat; what makes memory that no limit counts (shmget, semget,
msgget, mq_open, memfd_create); what reaches into other processes (ptrace, process_vm_readv, process_vm_writev, setns);
mounts and namespaces (mount, umount2, pivot_root, chroot, unshare, file handles); keys, bpf, perf events, userfaultfd,
personality."""
DENIED_EVERYWHERE = (425, 428, 429, 430, 431, 432, 433, 438, 442, 447)
"""io_uring_setup, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_getfd, mount_setattr and
memfd_secret."""
CLONE3, MOUNT_SETATTR = 435, 442
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446

READ_FILES = 0b1100
"""Landlock's rights to read files and folders."""
WRITE_FILES = (1 << 1) | (1 << 14)
CHANGE_FILES = READ_FILES | WRITE_FILES | (0b11 << 4) | (0b11 << 7) | (1 << 10) | (1 << 12) | (1 << 13)
"""To read, write, make and remove files, folders, pipes and symbolic links; never to run one, or to make a device."""

_libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> int:
    """A call's result; raises OSError that names what failed."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _system_call(what: str, number: int, *arguments: Any) -> int:
    return call(what, _libc.syscall(ctypes.c_long(number), *arguments))


def numbers() -> dict[str, Any]:
    """System calls of this machine; raises OSError on one whose numbers are not known."""
    machine = platform.machine()
    if machine not in NUMBERS:
        raise OSError(ENOSYS, f"no list of system calls for {machine}; there is one for {', '.join(NUMBERS)}")
    return NUMBERS[machine]


def unshare(flags: int) -> None:
    """Enter namespaces that nobody else is in; the process namespace holds the next child."""
    call("user, mount, process and network namespaces", _libc.unshare(flags))


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    own = [None if text is None else text.encode() for text in (source, target, kind, data)]
    call(f"mount at {target}", _libc.mount(own[0], own[1], own[2], ctypes.c_ulong(flags), own[3]))


def make_read_only(path: str, *, recursive: bool) -> None:
    """Make a mount, or all below it, read-only; set-user-id bits have no effect there."""
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    _system_call("mount_setattr", MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, len(attributes))


def change_root() -> None:
    """Make the working folder, a mount, the root; what was the root is not reachable after that."""
    _system_call("pivot_root", numbers()["pivot_root"], b".", b".")
    _system_call("umount2", numbers()["umount2"], b".", MNT_DETACH)
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up every capability, for good."""
    header, empty = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _system_call("capset", numbers()["capset"], header, empty)
    prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)


def prctl(what: str, option: int, value: int, argument: Any = 0) -> None:
    """prctl(2)."""
    call(what, _libc.prctl(option, ctypes.c_ulong(value), argument, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def landlock_version() -> int:
    """Landlock's interface; raises OSError where the kernel has none, or it is switched off."""
    return _system_call("Landlock", LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)


def restrict_files(rules: Sequence[tuple[str, int]]) -> None:
    """Landlock: nothing of the file system but these rights below these paths, no TCP, no signal to the outside."""
    version = landlock_version()
    handled = (1 << (13, 13, 14, 15, 15, 16)[min(version, 5)]) - 1
    whole = struct.pack("=QQQ", handled, 0b11, 0b11)
    attributes = whole[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _system_call("Landlock", LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path, rights in rules:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, folder)
        _system_call(f"Landlock's rule of {path}", LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(folder)
    _system_call("Landlock", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def filter_system_calls() -> None:
    """seccomp: the denied calls fail with EPERM, as clone does with namespaces; clone3, whose flags a filter cannot
    read, does not exist.
    """
    own = numbers()
    load, jump_equal, jump_set, give = 0x20, 0x15, 0x45, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS, 0x80000000
    namespaces = NAMESPACES | CLONE_NEWTIME
    program = [
        (load, 0, 0, 4),  # the architecture
        (jump_equal, 1, 0, own["audit"]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number; bit 30: the x32 interface
        (jump_set, 0, 1, 0x40000000),
        (give, 0, 0, kill),
        (jump_equal, 0, 1, CLONE3),
        (give, 0, 0, absent),
        (jump_equal, 0, 4, own["clone"]),
        (load, 0, 0, 16),  # the lower half of its flags
        (jump_set, 0, 1, namespaces),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    for number in (*own["denied"], *DENIED_EVERYWHERE):
        program += [(jump_equal, 0, 1, number), (give, 0, 0, deny)]
    program.append((give, 0, 0, allow))
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code)
    filter_ = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program), ctypes.addressof(held)))
    prctl("seccomp", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_))
