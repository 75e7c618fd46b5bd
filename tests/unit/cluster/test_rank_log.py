"""What a rank prints when its log's disk is full."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
PRINTING = """
import io, sys
from cluster.rank import LogFile
sys.stdout = io.TextIOWrapper(LogFile(), write_through=True)
print("a line")
print("another", flush=True)
sys.stdout.write("x" * 100_000)
sys.stdout.flush()
"""


def test_lines_without_room_are_lost_and_nothing_else() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", PRINTING], cwd=PROJECT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()


def test_lines_with_room_arrive() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTING], cwd=PROJECT, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"a line\nanother\n" + b"x" * 100_000
