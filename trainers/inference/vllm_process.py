"""The process that vLLM samples in, seen from outside: started, asked, watched, ended."""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.errors import StageError

SILENCE_S = 1800.0
"""A process that says nothing for so long is taken for dead; the first start compiles thousands of modules."""
WAKE_S = 1.0
"""How often a waiting caller is notified."""
END_S = 10.0
_NOT_HANDED_ON = (
    "PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class EngineDiedError(StageError):
    """The process has ended, or says nothing any more; another one can take its place."""


class VllmProcess:
    """A running `vllm_server`; `waiting` is called regularly while an answer is awaited, and may raise."""

    def __init__(self, python: Path, threads: int, waiting: Callable[[], None]) -> None:
        self._waiting = waiting
        self._socket, theirs = socket.socketpair()
        server = Path(__file__).with_name("vllm_server.py")
        # Modules next to the script are not vLLM's: -P leaves its folder out of the search path.
        command: Sequence[str | Path] = (python, "-P", server, str(theirs.fileno()))
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=_variables(threads))
        theirs.close()
        self._buffer = b""

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def ask(self, op: str, progress: Callable[[int], None] | None = None, **request: Any) -> Any:
        """The answer to a request; `progress` is called with the number of answered prompts meanwhile, and may raise.

        Raises StageError for what the process refuses, EngineDiedError where it is gone. Whatever is raised ends it,
        except a refusal.
        """
        try:
            self._socket.sendall(json.dumps({"op": op, **request}).encode() + b"\n")
            while True:
                message = json.loads(self._line())
                if "ok" in message:
                    return message["ok"]
                if "error" in message:
                    break
                if progress is not None:
                    progress(message["done"])
        except OSError as error:
            self.close()
            raise EngineDiedError(f"the process of vLLM {self.pid} is gone: {error}") from error
        except BaseException:
            self.close()
            raise
        raise StageError(f"vLLM refuses {op}: {message['error']}")

    def _line(self) -> bytes:
        """The next line that the process writes."""
        since = time.monotonic()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._socket], [], [], WAKE_S)
            self._waiting()
            if not ready:
                if time.monotonic() - since > SILENCE_S:
                    raise EngineDiedError(f"vLLM has said nothing for {SILENCE_S:.0f} s")
                continue
            if not (chunk := self._socket.recv(1 << 20)):
                status = self._process.wait()
                raise EngineDiedError(f"the process of vLLM {self.pid} has ended with status {status}; see its log")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def close(self) -> None:
        """End the process, and wait until it has ended."""
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _variables(threads: int) -> dict[str, str]:
    """What the process gets of this one's variables, and its own: no network, no report of use, no pinned cores."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
    return kept | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }
