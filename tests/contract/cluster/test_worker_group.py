"""What every worker group keeps, on Ray and in this process."""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local_group import LocalGroup
from cluster.protocol import WorkerFailed, WorkerGroup, WorkerSpec
from cluster.ray_group import RayGroup
from cluster.session import Session, start
from recipes.errors import Preempted, StoreDamaged

TARGETS = textwrap.dedent(
    """
    import os
    from recipes.errors import Preempted, StoreDamaged

    def describe(payload, worker):
        worker.beat("train", step=1, loss=0.5)
        worker.beat("save", step=2)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MARKED")
        found = {name: os.environ.get(name) for name in names}
        return {"payload": payload, "environment": found, "rank": worker.rank, "size": worker.world_size}

    def nothing(payload, worker):
        return None

    def fail(payload, worker):
        raise ValueError("bad row 17")

    def damaged(payload, worker):
        raise StoreDamaged("object ab12 is not its hash")

    def stopped(payload, worker):
        raise Preempted("saved at step 3")

    def asked(payload, worker):
        return {"asked": worker.stop_requested()}
    """
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder with the module `contract_targets`, importable here too."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "contract_targets.py").write_text(TARGETS)
    sys.path.insert(0, str(folder))
    yield str(folder)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One embedded Ray for the module."""
    with start(num_cpus=1, num_gpus=0) as session:
        yield session


@pytest.fixture(scope="module", params=["local", "ray"])
def make_group(request: pytest.FixtureRequest, targets: str) -> Callable[[Path], WorkerGroup]:
    """Makes a group of one worker."""

    def make(logs: Path) -> WorkerGroup:
        spec = WorkerSpec(
            name="one",
            num_workers=1,
            log_folder=logs,
            preload=None,
            environment={"MARKED": "yes", "PYTHONPATH": targets},
        )
        if request.param == "local":
            return LocalGroup(spec)
        found: Session = request.getfixturevalue("session")
        return RayGroup(found, spec)

    return make


@pytest.fixture
def group(make_group: Callable[[Path], WorkerGroup], tmp_path: Path) -> Iterator[WorkerGroup]:
    """A group, closed after the test."""
    with make_group(tmp_path) as group:
        yield group


def test_results_environment_and_beats(group: WorkerGroup) -> None:
    """JSON goes in and out; torchrun's variables are set; every phase is heard, in order."""
    beats: list[tuple[int, str, dict[str, Any]]] = []
    payload = {"numbers": [1, 2.5, None], "text": "é"}
    (result,) = group.run("contract_targets:describe", payload, lambda *beat: beats.append(beat))
    assert result is not None
    assert result["payload"] == payload
    assert (result["rank"], result["size"]) == (0, 1)
    port = result["environment"].pop("MASTER_PORT")
    assert 1024 < int(port) < 65536
    assert result["environment"] == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MARKED": "yes",
    }
    assert beats[-1] == (0, "save", {"step": 2})
    assert "RANK" not in os.environ


def test_none_is_a_result(group: WorkerGroup) -> None:
    """A stage that returns nothing has not failed."""
    assert group.run("contract_targets:nothing", {}) == [None]


def test_an_exception_is_a_verdict(group: WorkerGroup) -> None:
    """With its name, message, traceback; and the group goes on."""
    with pytest.raises(WorkerFailed) as failure:
        group.run("contract_targets:fail", {})
    verdict = failure.value.verdict
    assert (verdict.kind, verdict.rank, verdict.error, verdict.infrastructure) == ("exception", 0, "ValueError", False)
    assert verdict.message.startswith("ValueError: bad row 17 (rank 0 on node ")
    assert "in fail" in verdict.traceback
    assert failure.value.exit_code == 4
    assert group.run("contract_targets:nothing", {}) == [None]


def test_exit_codes_of_the_tree_survive(group: WorkerGroup) -> None:
    """A damaged store found by a worker ends the command with the store's code."""
    with pytest.raises(WorkerFailed) as failure:
        group.run("contract_targets:damaged", {})
    assert failure.value.exit_code == StoreDamaged.exit_code
    assert failure.value.verdict.error == "StoreDamaged"


def test_preemption_is_not_a_failure(group: WorkerGroup) -> None:
    """It comes out as itself."""
    with pytest.raises(Preempted, match="saved at step 3"):
        group.run("contract_targets:stopped", {})


def test_what_is_not_json_is_refused_where_it_is_given(group: WorkerGroup) -> None:
    """Before any process is asked."""
    with pytest.raises(TypeError):
        group.run("contract_targets:nothing", {"a": object()})


def test_stop_holds(group: WorkerGroup) -> None:
    """A group that was stopped starts nothing."""
    group.prepare()
    assert group.run("contract_targets:asked", {}) == [{"asked": False}]
    group.stop()
    with pytest.raises(Preempted):
        group.run("contract_targets:asked", {})


def test_close_twice(make_group: Callable[[Path], WorkerGroup], tmp_path: Path) -> None:
    """Closing is idempotent and possible before any run."""
    group = make_group(tmp_path)
    group.close()
    group.close()
