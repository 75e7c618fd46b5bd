"""A worker group on a real embedded Ray: environment, results, deaths, stalls, stops, imports, placement."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from cluster.protocol import WorkerFailed, WorkerGroup, WorkerSpec
from cluster.ray_group import RayGroup
from cluster.session import Session, start
from recipes.errors import CapacityError, Preempted

pytestmark = pytest.mark.serial

MakeSpec = Callable[..., WorkerSpec]


@pytest.fixture(scope="module")
def group(session: Session, make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    """Two ranks, for every test that leaves the group as good as new, and so also a test that it is."""
    with RayGroup(session, make_spec(log_folder=tmp_path_factory.mktemp("logs"))) as group:
        yield group


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_environment_results_beats_and_logs(group: WorkerGroup) -> None:
    """Torchrun's variables, results in rank order, beats in this thread, a log per rank, no Ray inside the rank."""
    beats: list[tuple[int, str, dict[str, Any], int]] = []
    results = group.run(
        "cluster_targets:echo",
        {"text": "é"},
        lambda rank, phase, progress: beats.append((rank, phase, progress, threading.get_ident())),
        label="base-1",
    )
    assert [result["rank"] for result in results if result] == [0, 1]
    for rank, result in enumerate(results):
        assert result is not None
        assert result["payload"] == {"text": "é"}
        assert result["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": results[0] and results[0]["environment"]["MASTER_PORT"],
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        assert not result["has_ray"]
        assert result["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)
        assert result["preloaded_at"]
        assert not is_alive(result["pid"])
        assert f"echo from rank {rank}" in (group.spec.log_folder / f"base-1-rank-{rank}.log").read_text()
    assert {(rank, phase, progress["step"], thread) for rank, phase, progress, thread in beats} == {
        (rank, "work", 1, threading.get_ident()) for rank in (0, 1)
    }


def test_a_group_listens_on_its_own_address_alone_and_its_keys_begin_with_a_secret(group: WorkerGroup) -> None:
    """Neither torch's store nor gloo listens everywhere; each run has another key; DeepSpeed keeps the group."""
    first = group.run("cluster_targets:look_at_sockets", {})
    second = group.run("cluster_targets:key_of_the_group", {})
    for result in first:
        assert result is not None
        assert set(result["listening"]) == {"127.0.0.1"}
        assert (result["sum"], result["kept"], result["exchanged"]) == ([3.0], True, [0, 1])
        assert result["stranger"] == "gets no answer"
    keys = [{result["key"] for result in run if result} for run in (first, second)]
    assert [len(found) for found in keys] == [1, 1]
    assert keys[0] != keys[1]


def test_runs_share_the_imports_and_nothing_else(group: WorkerGroup) -> None:
    """Each run has processes of its own, in which the import stands as it was and what another run did is unknown."""
    first = group.run("cluster_targets:echo", {})
    started = time.monotonic()
    second = group.run("cluster_targets:echo", {})
    took_s = time.monotonic() - started
    assert not {result["pid"] for result in first if result} & {result["pid"] for result in second if result}
    assert [result["runs_in_process"] for result in [*first, *second] if result] == [1, 1, 1, 1]
    imports = [
        {(result["rank"], result["preloaded_at"]) for result in results if result} for results in (first, second)
    ]
    assert imports[0] == imports[1]
    assert took_s < 3.0


def test_a_failing_import_is_the_ranks_error(session: Session, make_spec: MakeSpec) -> None:
    """What the import printed and raised is with the verdict; the group does not hang."""
    with RayGroup(session, make_spec(num_workers=1, preload="no_such_wave")) as group:
        assert group.run("cluster_targets:echo", {})[0]
        with pytest.raises(WorkerFailed) as failure:
            group.run("no_such_wave:echo", {})
    assert "No module named 'no_such_wave'" in failure.value.verdict.message


def test_an_import_that_kills_the_process(session: Session, make_spec: MakeSpec) -> None:
    """A crash while importing is told as what it was."""
    with RayGroup(session, make_spec(num_workers=1, preload="crash")) as group, pytest.raises(WorkerFailed) as failure:
        group.run("cluster_targets:echo", {})
    assert failure.value.verdict.kind == "exit"
    assert "exit status 7" in failure.value.verdict.message
    assert "crashed on import" in failure.value.verdict.tail


def test_an_import_that_touched_the_gpu_driver(session: Session, make_spec: MakeSpec) -> None:
    """CUDA does not survive a fork: such a rank starts in a new interpreter."""
    with RayGroup(session, make_spec(num_workers=1, preload="touching")) as group:
        (result,) = group.run("cluster_targets:echo", {})
    assert result
    assert not result["touched"]


def test_a_killed_fork_server_is_replaced(group: WorkerGroup) -> None:
    """Its ranks end with it, which is an infrastructure failure; the next run works."""
    killed: list[int] = []

    def kill(rank: int, phase: str, progress: dict[str, Any]) -> None:
        if not killed and len(group.pids()) == 2:
            killed.append(psutil.Process(group.pids()[0]).ppid())
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(WorkerFailed, match=r"signal 9 \(SIGKILL\): rank 0 on node"):
        group.run("cluster_targets:beat_often", {"steps": 20_000}, kill)
    assert killed
    assert len(group.run("cluster_targets:echo", {})) == 2


def test_gloo_group_from_the_environment(group: WorkerGroup) -> None:
    """Torch's own rendezvous works with what the group sets."""
    assert group.run("cluster_targets:all_reduce", {}) == [{"sum": 3.0}, {"sum": 3.0}]


def test_the_first_failing_rank_is_the_error(group: WorkerGroup) -> None:
    """The others' broken connections are folded, even when they came first to the driver."""
    with pytest.raises(WorkerFailed) as failure:
        group.run("cluster_targets:fail_on", {"rank": 1, "how": "raise", "others_after_s": 0.0})
    verdict = failure.value.verdict
    assert (verdict.kind, verdict.rank, verdict.error) == ("exception", 1, "ValueError")
    assert "the loss is a fish" in verdict.message
    assert "rank 1 on node" in verdict.message
    assert "cluster_targets.py" in verdict.traceback
    assert verdict.infrastructure is False
    assert len(verdict.folded) == 1
    assert "Connection closed by peer" in verdict.folded[0]
    assert "last words of the rank" in verdict.tail


@pytest.mark.parametrize(
    ("how", "kind", "text", "infrastructure"),
    [
        (int(signal.SIGKILL), "signal", "signal 9 (SIGKILL)", True),
        (int(signal.SIGSEGV), "signal", "signal 11 (SIGSEGV)", False),
        ("exit", "exit", "exit status 3", False),
        ("disk", "disk_full", "No space left", False),
    ],
)
def test_one_verdict_per_death(group: WorkerGroup, how: int | str, kind: str, text: str, infrastructure: bool) -> None:
    """Different deaths have different one-line causes, with rank and node, and the group works on."""
    with pytest.raises(WorkerFailed) as failure:
        group.run("cluster_targets:fail_on", {"rank": 0, "how": how}, label="death")
    verdict = failure.value.verdict
    assert (verdict.kind, verdict.rank, verdict.infrastructure) == (kind, 0, infrastructure)
    assert text in verdict.message
    assert f"rank 0 on node {verdict.node} during train" in verdict.message
    assert "last words of the rank" in verdict.tail


def test_a_kill_is_seen_within_a_second(group: WorkerGroup) -> None:
    """From kill -9 to the end of the run, which waits another second for the others' causes."""
    killed_at: list[float] = []

    def kill(rank: int, phase: str, progress: dict[str, Any]) -> None:
        if not killed_at and len(group.pids()) == 2:
            killed_at.append(time.monotonic())
            os.kill(group.pids()[1], signal.SIGKILL)

    with pytest.raises(WorkerFailed, match=r"signal 9 \(SIGKILL\): rank 1 on node"):
        group.run("cluster_targets:beat_often", {"steps": 20_000}, kill)
    assert time.monotonic() - killed_at[0] < 4.0
    assert not any(is_alive(pid) for pid in group.pids().values())


def test_a_killed_ray_worker_is_replaced(group: WorkerGroup) -> None:
    """The process that Ray knows dies: an infrastructure failure, nothing left of its rank, and the next run works."""
    killed: list[int] = []

    def kill(rank: int, phase: str, progress: dict[str, Any]) -> None:
        if not killed and len(group.pids()) == 2:
            killed.append(group.pids()[0])
            fork_server = psutil.Process(killed[0]).parent()
            assert fork_server is not None
            os.kill(fork_server.ppid(), signal.SIGKILL)

    with pytest.raises(WorkerFailed) as failure:
        group.run("cluster_targets:beat_often", {"steps": 20_000}, kill)
    assert failure.value.verdict.kind == "lost"
    assert failure.value.verdict.infrastructure is True
    assert failure.value.verdict.rank == 0
    assert not is_alive(killed[0])
    assert len(group.run("cluster_targets:echo", {})) == 2


def test_a_stall_names_the_rank_with_its_stack(session: Session, make_spec: MakeSpec) -> None:
    """Both ranks are silent; the one that is a step behind holds up the other."""
    with RayGroup(session, make_spec(stall_limits_s={"train": 1.5})) as group:
        with pytest.raises(WorkerFailed) as failure:
            group.run("cluster_targets:fail_on", {"rank": 1, "how": "hang", "step": 6})
        verdict = failure.value.verdict
        assert (verdict.kind, verdict.rank, verdict.infrastructure) == ("stall", 1, True)
        assert "at step 6" in verdict.message
        assert set(verdict.stacks) == {0, 1}
        assert "in fail_on" in verdict.stacks[1]
        assert not any(is_alive(pid) for pid in group.pids().values())


def test_a_stopped_rank_is_named_with_every_stack(session: Session, make_spec: MakeSpec) -> None:
    """In a phase of any name, without a limit for it."""
    with RayGroup(session, make_spec(stall_after_s=1.0)) as group:
        stopped: list[int] = []

        def freeze(rank: int, phase: str, progress: dict[str, Any]) -> None:
            if not stopped and len(group.pids()) == 2:
                stopped.append(group.pids()[1])
                os.kill(stopped[0], signal.SIGSTOP)

        with pytest.raises(WorkerFailed) as failure:
            group.run("cluster_targets:beat_often", {"steps": 20_000}, freeze)
        verdict = failure.value.verdict
        assert (verdict.kind, verdict.rank, verdict.infrastructure) == ("stall", 1, True)
        assert all("in beat_often" in verdict.stacks[rank] for rank in (0, 1))
        assert not is_alive(stopped[0])


@pytest.mark.long
def test_a_stopped_ray_worker_is_noticed_and_replaced(session: Session, make_spec: MakeSpec) -> None:
    """Its pulses do not come back: they age. Who watches hears of it before the verdict."""
    said: list[str] = []
    with RayGroup(session, make_spec(stall_after_s=8.0), said.append) as group:
        stopped: list[float] = []

        def freeze(rank: int, phase: str, progress: dict[str, Any]) -> None:
            if not stopped and len(group.pids()) == 2:
                fork_server = psutil.Process(group.pids()[1]).parent()
                assert fork_server is not None
                os.kill(fork_server.ppid(), signal.SIGSTOP)
                stopped.append(time.monotonic())

        with pytest.raises(WorkerFailed) as failure:
            group.run("cluster_targets:beat_often", {"steps": 100_000}, freeze)
        assert time.monotonic() - stopped[0] < 20
        verdict = failure.value.verdict
        assert (verdict.kind, verdict.rank, verdict.infrastructure) == ("stall", 1, True)
        assert "in beat_often" in verdict.stacks[0]
        assert any("127.0.0.1" in text for text in said)
        assert len(group.run("cluster_targets:echo", {})) == 2


def test_stop_reaches_every_rank(session: Session, make_spec: MakeSpec) -> None:
    """Ranks that save and leave make a preemption; the group starts nothing after that."""
    with RayGroup(session, make_spec()) as group:
        threading.Timer(1.0, group.stop).start()
        with pytest.raises(Preempted, match="saved at step 1"):
            group.run("cluster_targets:wait_for_stop", {})
        with pytest.raises(Preempted):
            group.run("cluster_targets:echo", {})


def test_stop_kills_after_the_grace(session: Session, make_spec: MakeSpec) -> None:
    """A target that does not look is killed, and the verdict says that it was asked for."""
    with RayGroup(session, make_spec(stop_grace_s=1.0)) as group:
        threading.Timer(0.8, group.stop).start()
        with pytest.raises(WorkerFailed) as failure:
            group.run("cluster_targets:ignore_stop", {})
        assert failure.value.verdict.kind == "stopped"


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_rank_with_nothing_to_save_leaves_at_once(session: Session, make_spec: MakeSpec, in_loop: bool) -> None:
    """Whatever it is doing, and whatever it has started."""
    with RayGroup(session, make_spec(stop_grace_s=60.0)) as group:
        stopped: list[float] = []

        def stop(rank: int, phase: str, progress: dict[str, Any]) -> None:
            if not stopped:
                stopped.append(time.monotonic())
                group.stop()

        with pytest.raises(Preempted, match="stopped in data"):
            group.run("cluster_targets:work_on", {"in_loop": in_loop}, stop)
        assert time.monotonic() - stopped[0] < 5


def test_a_stop_does_not_wait_for_imports(session: Session, make_spec: MakeSpec) -> None:
    """A process that its server has not forked yet is given up, and ends when it is forked."""
    with RayGroup(session, make_spec(stop_grace_s=60.0, preload="slow_import")) as group:
        group.prepare()
        threading.Timer(1.0, group.stop).start()
        started = time.monotonic()
        with pytest.raises(Preempted, match="before it started"):
            group.run("cluster_targets:echo", {})
        assert time.monotonic() - started < 8


def test_sigterm_of_one_rank_asks_it_to_stop(group: WorkerGroup) -> None:
    """As a cluster that takes a node back does."""
    sent: list[int] = []

    def terminate(rank: int, phase: str, progress: dict[str, Any]) -> None:
        if not sent and len(group.pids()) == 2:
            sent.extend(group.pids().values())
            for pid in sent:
                os.kill(pid, signal.SIGTERM)

    with pytest.raises(Preempted):
        group.run("cluster_targets:wait_for_stop", {}, terminate)


def test_a_reusable_group_keeps_its_process(session: Session, make_spec: MakeSpec) -> None:
    """One process for every run, beside a group that holds every CPU; a failure costs the process, not the group."""
    with RayGroup(session, make_spec(name="verifier", num_workers=1, cpus_per_worker=0, reusable=True)) as group:
        pids = {result["pid"] for _ in range(3) for result in group.run("cluster_targets:echo", {}) if result}
        assert len(pids) == 1
        with pytest.raises(WorkerFailed):
            group.run("cluster_targets:fail_on", {"rank": 0, "how": "raise"})
        again = group.run("cluster_targets:echo", {})
        assert again[0] is not None
        assert again[0]["pid"] not in pids


def test_gpu_workers_see_the_devices_of_their_node(session: Session, make_spec: MakeSpec) -> None:
    """One GPU each in the placement; all of the group's on the node in view, indexed by local rank; in every run."""
    with RayGroup(session, make_spec(gpus_per_worker=1)) as group:
        assert sum(node.free_gpus for node in session.nodes()) == 1
        results = group.run("cluster_targets:echo", {}) + group.run("cluster_targets:echo", {})
        seen = {result["environment"]["CUDA_VISIBLE_DEVICES"] for result in results if result}
        assert len(seen) == 1
        assert len(set(seen.pop().split(","))) == 2
        assert {result["environment"]["DS_ACCELERATOR"] for result in results if result} == {None}
    with pytest.raises(CapacityError, match=r"needs 4 GPU and 4 CPU \(4 workers\); the cluster has 3 GPU and 4 CPU"):
        RayGroup(session, make_spec(num_workers=4, gpus_per_worker=1))


def test_what_cannot_fit_is_refused_at_once(session: Session, make_spec: MakeSpec) -> None:
    """The message says what was asked and what is there."""
    started = time.monotonic()
    with pytest.raises(CapacityError, match=r"needs 5 CPU \(5 workers\); the cluster has 4 CPU on 1 node"):
        RayGroup(session, make_spec(num_workers=5))
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("group")
def test_what_is_busy_names_the_holders(session: Session, make_spec: MakeSpec) -> None:
    """The deadline holds, the holders are named, and a release lets the next one in."""
    waits: list[str] = []
    with (
        RayGroup(session, make_spec(name="holder", num_workers=2)),
        pytest.raises(CapacityError, match=r"held by 'trainwright/holder-.{4}' \(2 CPU\), .*; gave up after 1 s"),
    ):
        RayGroup(session, make_spec(name="late", placement_timeout_s=1), waits.append)
    assert waits == [waits[0]]
    assert waits[0].startswith("waiting for resources: needs 1 CPU (1 worker) on one node for each worker")
    with RayGroup(session, make_spec(name="late")) as group:
        assert len(group.run("cluster_targets:echo", {})) == 2


def test_a_second_session_is_refused_and_harms_nothing(group: WorkerGroup) -> None:
    """Ray's client is a global of the process."""
    with pytest.raises(RuntimeError, match="connected to Ray already"):
        start()
    assert len(group.run("cluster_targets:echo", {})) == 2


def test_strangers_are_refused(session: Session) -> None:
    """Every port of the embedded Ray is on the loopback interface, and wants the session's token."""
    services = psutil.Process().children(recursive=True)
    ports = {
        (connection.laddr.ip.removeprefix("::ffff:"), service.name())
        for service in services
        for connection in service.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name for _, name in ports} >= {"gcs_server", "raylet"}
    assert {address for address, _ in ports} == {"127.0.0.1"}
    assert session.folder is not None
    assert (session.folder / "token").stat().st_mode & 0o077 == 0
    assert session.folder.stat().st_mode & 0o077 == 0
    ask = "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', b'x', timeout=5)"
    command = [sys.executable, "-c", ask, ray.get_runtime_context().gcs_address]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for token, is_let_in in ((None, False), ("cd" * 32, False), ((session.folder / "token").read_text(), True)):
        credentials = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        asked = subprocess.run(
            command, env={**clean, "HOME": "/nowhere", **credentials}, capture_output=True, text=True, check=False
        )
        assert (asked.returncode == 0) == is_let_in, asked.stderr
        assert is_let_in or "AuthenticationError" in asked.stderr


def test_a_missing_target_is_a_verdict(group: WorkerGroup) -> None:
    """Nothing hangs when a module is not there."""
    with pytest.raises(WorkerFailed, match="ModuleNotFoundError"):
        group.run("no_such_module:run", {})
