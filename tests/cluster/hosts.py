"""Hosts on one machine: each has its own network, host name, mounts, processes, shared memory, /tmp, home and boot id.

They are joined by a bridge in one more network namespace. Nothing outside the namespaces is touched. Needs root,
iproute2 and util-linux.
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
STORE, TOKEN, RECIPES, HOME = "/srv/store", "/srv/token", "/srv/recipes", "/srv/home"
RAY_PORT, DASHBOARD_PORT = 6379, 8265
PR_SET_PDEATHSIG = 1
OBJECT_STORE_BYTES = 80_000_000
"""The smallest that Ray takes."""

INIT = r"""
import json, os, signal, subprocess, sys
settings = json.loads(sys.argv[1])
def sh(*command): subprocess.run(command, check=True)
sh("hostname", settings["name"])
sh("mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", "/dev/shm")
sh("mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", "/srv")
os.makedirs(settings["home"])
for source, target in settings["binds"]:
    if os.path.isdir(source): os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target): open(target, "x").close()
    sh("mount", "--bind", source, target)
sh("mount", "--rbind", settings["tmp"], "/tmp")
sh("ip", "link", "set", "lo", "up")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True: signal.pause()
"""


def why_not() -> str | None:
    """Why this machine cannot hold hosts; None if it can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]
    if missing:
        return f"hosts in namespaces need {', '.join(missing)} (util-linux, iproute2)"
    trial = [
        "unshare",
        "--net",
        "--uts",
        "--ipc",
        "--mount",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "br0",
        "type",
        "bridge",
    ]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return f"no namespaces or no bridge here: {done.stderr.strip()}" if done.returncode else None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Host:
    """One host: the process that keeps its namespaces, and how to run commands there."""

    name: str
    address: str
    port: str
    """Its end of the cable at the bridge."""
    keeper: subprocess.Popen[str]
    init: int
    """Process 1 of the host, by its id here."""
    environment: dict[str, str]
    switch: "Switch"

    def command(self, *arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """Return what runs a command on the host."""
        pairs = [f"{key}={value}" for key, value in {**self.environment, **(environment or {})}.items()]
        place = ["nsenter", "-t", str(self.init), "-n", "-u", "-i", "-m", "-p", "--"]
        return [*place, "env", "-i", "-C", RECIPES, *pairs, *arguments]

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it must succeed unless `check` is false."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)
        assert not check or done.returncode == 0, f"{self.name}: {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done

    def trainwright(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of trainwright."""
        return self.run(sys.executable, "-m", "launch.cli", *arguments, check=check)

    def ray(self, head: "Host | None" = None) -> None:
        """Start Ray here: the head, or a node of a head's cluster."""
        place = (
            ["--head", f"--port={RAY_PORT}", f"--dashboard-host={self.address}", f"--dashboard-port={DASHBOARD_PORT}"]
            if head is None
            else [f"--address={head.address}:{RAY_PORT}"]
        )
        sizes = ["--num-cpus=1", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        ray = str(Path(sys.executable).with_name("ray"))
        self.run(ray, "start", *place, f"--node-ip-address={self.address}", *sizes, "--disable-usage-stats")

    def set_link(self, up: bool) -> None:
        """Plug its cable in or out."""
        self.switch.run("ip", "link", "set", self.port, "up" if up else "down")

    def crash(self) -> None:
        """End as by a power cut: nobody on the network hears of it."""
        self.set_link(up=False)
        self.end()
        with contextlib.suppress(subprocess.CalledProcessError):  # gone with the host's network
            self.switch.run("ip", "link", "del", self.port)

    def end(self) -> None:
        """Kill every process of the host."""
        if self.keeper.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        self.keeper.communicate(timeout=30)

    def processes(self) -> dict[int, str]:
        """Command names by process id, of the host's own numbering."""
        script = "for p in /proc/[0-9]*; do echo ${p#/proc/} $(cat $p/comm 2>/dev/null); done"
        lines = (line.split(None, 1) for line in self.run("sh", "-c", script).stdout.splitlines())
        return {int(line[0]): line[1] for line in lines if len(line) == 2}

    def listeners(self) -> list[str]:
        """Addresses with ports on which a rank of the host listens."""
        lines = self.run("ss", "-Hltnp").stdout.splitlines()
        return [line.split()[3] for line in lines if '"rank-' in line]


@dataclass
class Switch:
    """The network namespace of the bridge."""

    process: subprocess.Popen[bytes]

    @classmethod
    def build(cls) -> "Switch":
        """Make it; ends with this process."""
        held = [
            "unshare",
            "--net",
            "sh",
            "-c",
            "ip link add br0 type bridge && ip link set br0 up && echo && exec sleep infinity",
        ]
        process = subprocess.Popen(held, preexec_fn=_die_with_parent, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n", "the bridge could not be made"
        return cls(process)

    def run(self, *command: str) -> None:
        """Run a command in the bridge's namespace."""
        subprocess.run(["nsenter", "-t", str(self.process.pid), "-n", *command], check=True, capture_output=True)


@dataclass
class Lab:
    """Hosts that share a store, a folder of recipes and a token."""

    root: Path
    switch: Switch
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """The shared store, as this machine sees it."""
        return self.root / "store"

    @property
    def recipes(self) -> Path:
        """The shared folder of recipes, as this machine sees it."""
        return self.root / "recipes"

    def add(self, name: str) -> Host:
        """Build a host and connect it."""
        number = len(self.hosts) + 1
        base = self.root / name
        tmp = base / "tmp"
        tmp.mkdir(parents=True)
        tmp.chmod(0o1777)
        (base / "boot_id").write_text("-".join(secrets.token_hex(n) for n in (4, 2, 2, 2, 6)) + "\n")
        code = [path for path in (PROJECT, Path(sys.prefix)) if path.is_relative_to("/tmp")]
        settings = {
            "name": name,
            "home": HOME,
            "tmp": str(tmp),
            "binds": [
                [str(self.store), STORE],
                [str(self.root / "token"), TOKEN],
                [str(self.recipes), RECIPES],
                [str(self.root / "names"), "/etc/hosts"],
                [str(base / "boot_id"), "/proc/sys/kernel/random/boot_id"],
                *([str(path), str(tmp / path.relative_to("/tmp"))] for path in code),
            ],
        }
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        keeper = subprocess.Popen(
            ["unshare", *spaces, sys.executable, "-c", INIT, json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_die_with_parent,
        )
        assert keeper.stdout is not None
        if keeper.stdout.readline() != "ready\n":
            raise AssertionError(f"host {name} could not be built: {keeper.communicate(timeout=30)[1]}")
        init = int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()[0])
        host = Host(name, f"{NETWORK}.{number}", f"p{number}", keeper, init, environment_of_hosts(), self.switch)
        self.switch.run("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", str(init))
        self.switch.run("ip", "link", "set", host.port, "master", "br0", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        self.hosts[name] = host
        with (self.root / "names").open("a") as names:
            names.write(f"{host.address} {name}\n")
        return host

    def close(self) -> None:
        """End all hosts and the bridge."""
        for host in self.hosts.values():
            host.end()
        self.switch.process.kill()
        self.switch.process.communicate()


def environment_of_hosts() -> dict[str, str]:
    """Variables of a login on a host."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "COLUMNS": "200",
        "PYTHONPATH": str(PROJECT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRAINWRIGHT_STORE": STORE,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
    }


@contextlib.contextmanager
def built() -> Iterator[Lab]:
    """A lab without hosts; everything ends with the block."""
    root = Path(tempfile.mkdtemp(prefix="hosts-"))
    try:
        for name in ("store", "recipes"):
            (root / name).mkdir()
        (root / "names").write_text("127.0.0.1 localhost\n")
        (root / "token").touch(mode=0o600)
        (root / "token").write_text(secrets.token_hex(32))
        lab = Lab(root, Switch.build())
        try:
            yield lab
        finally:
            lab.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def wait(found: Callable[[], object], what: str, timeout_s: float = 180.0) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.3)
