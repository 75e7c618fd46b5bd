"""Disks of their own for tests that fill or lose them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts things, and unmounts them at the end."""
    mounted: list[Path] = []

    def make(*options: str, name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        try:
            subprocess.run(["mount", *options, str(target)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"") or str(error).encode()
            pytest.skip(f"cannot mount here: {reason.decode().strip()[:100]}")
        mounted.append(target)
        return target

    yield make
    left = [target for target in reversed(mounted) if os.path.ismount(target)]
    for target in left:
        subprocess.run(["umount", "-l", str(target)], capture_output=True)
    assert not [target for target in left if os.path.ismount(target)]
