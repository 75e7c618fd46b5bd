"""Ray's job server through its REST interface alone, so nothing of Ray is imported here."""

import json
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.topology import Node, read_nodes
from recipes.errors import CapacityError, RequestError

REQUEST_TIMEOUT_S = 4.0
HANDSHAKE_TIMEOUT_S = 60.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

# The interpreter that Ray's own workers use, read from the raylet that is this shell's grandparent.
_PYTHON = (
    "R=$(awk '/^PPid:/{print $2}' /proc/$PPID/status); "
    "P=$(tr '\\0' '\\n' < /proc/$R/cmdline | sed -n 's/^--python_worker_command=\\([^ ]*\\).*/\\1/p'); "
    'exec "${P:-python3}"'
)
_VERSION, _NODES = "trainwright=", "nodes="
_HANDSHAKE = (
    f"from importlib.metadata import version; print('{_VERSION}' + version('trainwright'), flush=True); "
    f"from launch.capacity.nodes import main; print('{_NODES}', end=''); raise SystemExit(main('auto'))"
)


def is_job_server(address: str | None) -> bool:
    """Whether an address is that of a job server (http) rather than of a cluster itself."""
    return address is not None and urlsplit(address).scheme in ("http", "https")


@dataclass(frozen=True)
class JobServer:
    """Ray's job server at http://HEAD:8265; the token is found where Ray looks for it."""

    address: str

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request; raises CapacityError when nothing answers, RequestError when it refuses."""
        headers = {"Content-Type": "application/json"}
        token = find_token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.address.rstrip("/") + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=REQUEST_TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise RequestError(
                    f"{self.address} refuses the token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
                ) from None
            text = error.read().decode(errors="replace").strip().splitlines()
            raise RequestError(f"{self.address}{path}: {error.code} {text[-1] if text else error.reason}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise CapacityError(f"no job server answers at {self.address}: {reason}") from None

    def ray_version(self) -> str:
        """The cluster's version of Ray."""
        return str(self.request("GET", "/api/version")["ray_version"])

    def nodes(self) -> list[Node]:
        """The cluster's living nodes; what is free is not known here."""
        answer = self.request("GET", "/api/v0/nodes?detail=1&limit=10000")
        found = []
        for entry in answer["data"]["result"]["result"]:
            if entry["state"] == "ALIVE":
                total = entry["resources_total"]
                cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
                memory = int(total.get("memory", 0))
                found.append(Node(entry["node_id"], entry["node_ip"], cpus, gpus, memory, cpus, gpus))
        return found

    def start_job(self, arguments: Sequence[str], metadata: dict[str, str]) -> str:
        """Run a command by the cluster's own interpreter on its head; returns the submission's id."""
        command = f"{_PYTHON} {shlex.join(arguments)}"
        return str(self.request("POST", "/api/jobs/", {"entrypoint": command, "metadata": metadata})["submission_id"])

    def job(self, submission: str) -> dict[str, Any]:
        """Status and message of a job."""
        found: dict[str, Any] = self.request("GET", f"/api/jobs/{submission}")
        return found

    def logs(self, submission: str) -> str:
        """What a job printed."""
        return str(self.request("GET", f"/api/jobs/{submission}/logs").get("logs", ""))

    def stop_job(self, submission: str) -> None:
        """Stop a job."""
        self.request("POST", f"/api/jobs/{submission}/stop")


def find_token() -> str | None:
    """The cluster's token: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        return None


def shake_hands(server: JobServer) -> list[Node]:
    """Ask the cluster for its nodes, with what their processors can do.

    Raises RequestError that names both versions for a cluster whose package is not this one's, CapacityError for one
    that does not answer.
    """
    mine = version("trainwright")
    lines = ask_job(server, ["-c", _HANDSHAKE], "handshake", HANDSHAKE_TIMEOUT_S)
    last = lines[-1] if lines else "no output"
    theirs, nodes = (
        next((line.removeprefix(mark) for line in reversed(lines) if line.startswith(mark)), None)
        for mark in (_VERSION, f"{_NODES}[")
    )
    if theirs is None:
        raise RequestError(f"the cluster at {server.address} has no trainwright (here {mine}): {last}")
    if theirs != mine:
        raise RequestError(f"versions differ: trainwright {mine} here, {theirs} on the cluster at {server.address}")
    if nodes is None:
        raise CapacityError(f"the cluster at {server.address} does not say what its nodes have: {last}")
    return read_nodes(f"[{nodes}")


def ask_job(server: JobServer, arguments: Sequence[str], purpose: str, timeout_s: float) -> list[str]:
    """Run a short job to its end; returns the lines that it printed."""
    submission = server.start_job(arguments, {"trainwright": purpose})
    deadline = time.monotonic() + timeout_s
    while server.job(submission)["status"] not in ENDED:
        if time.monotonic() > deadline:
            server.stop_job(submission)
            raise CapacityError(f"{server.address} did not end the job '{purpose}' within {timeout_s:.0f} s")
        time.sleep(0.2)
    return server.logs(submission).splitlines()


def job_end(address: str, submission: str) -> str | None:
    """How a job ended, in words; None while it may still run, or when the job server does not answer."""
    try:
        job = JobServer(address).job(submission)
    except (CapacityError, RequestError) as error:
        # Without an answer, or without the token, nothing is known.
        return str(error) if ": 404 " in str(error) else None
    if job["status"] not in ENDED:
        return None
    return f"its job ended as {job['status']}: {job.get('message') or 'no message'}"


def stop_job(address: str, submission: str) -> None:
    """Stop a job that has not begun its run."""
    JobServer(address).stop_job(submission)
