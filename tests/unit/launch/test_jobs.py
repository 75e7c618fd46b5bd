"""Submission against a job server that is played: what is asked, what is refused, and what is never written then."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launch import api
from launch.jobs import find_token, is_job_server, submit
from launch.records import RunRecord
from recipes.errors import CapacityError, RecipeError, RequestError
from trainers.store.store import Store

TOKEN = "a-token"


class Cluster:
    """What the played job server has and was asked."""

    def __init__(self) -> None:
        self.cpus = [2.0, 2.0, 2.0]
        self.their_version = version("trainwright")
        self.jobs: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.status = "SUCCEEDED"
        self.address = ""

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Any:
        if path == "/api/version":
            return {"ray_version": "2.60.0"}
        if path.startswith("/api/v0/nodes"):
            nodes = [
                {"node_id": str(i), "node_ip": f"10.0.0.{i}", "state": "ALIVE", "resources_total": {"CPU": cpus}}
                for i, cpus in enumerate(self.cpus)
            ]
            return {"data": {"result": {"result": [*nodes, {**nodes[0], "state": "DEAD"}]}}}
        if method == "POST" and path == "/api/jobs/":
            self.jobs.append(body)
            return {"submission_id": f"job_{len(self.jobs)}"}
        if path.endswith("/logs"):
            return {"logs": f"some noise\ntrainwright={self.their_version}\n"}
        if path.endswith("/stop"):
            self.stopped.append(path.split("/")[-2])
            return {"stopped": True}
        return {"status": self.status, "message": "why"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    played = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.send_error(401)
                return
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "{}")
            data = json.dumps(played.answer(self.command, self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        played.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield played
        server.shutdown()
        thread.join()


@pytest.fixture
def docs(recipe: Path) -> Path:
    """The toy recipe on data that every machine has."""
    text = re.sub(r"\{source: text, files: \[text\.txt\]\}", "{source: python-docs, limit: 8}", recipe.read_text())
    recipe.write_text(text)
    return recipe


def test_a_submission_carries_the_runs_id_and_the_store_and_nothing_else(
    cluster: Cluster, docs: Path, store: Store
) -> None:
    run = submit(docs, address=cluster.address, store=store.uri)
    handshake, job = cluster.jobs
    assert "-m launch.cli run --submitted" in job["entrypoint"]
    assert job["entrypoint"].endswith(f"{run} --store {store.uri} --address auto")
    assert set(job) == {"entrypoint", "metadata"}
    assert TOKEN not in json.dumps(cluster.jobs)
    assert handshake["metadata"] == {"trainwright": "handshake"}
    record = RunRecord.open(store, run)
    assert record.resolved().recipe.cluster.workers == 2
    assert [event["event"] for event in record.events()] == ["run_submitted"]
    cluster.status = "RUNNING"
    assert [summary.state for summary in api.status(store=store.uri)] == ["submitted"]


def test_more_workers_than_the_cluster_has_are_refused_before_anything_is_written(
    cluster: Cluster, docs: Path, store: Store
) -> None:
    with pytest.raises(CapacityError, match=r"needs 8 CPU \(8 workers\); the cluster has 6 CPU on 3 nodes"):
        submit(docs, address=cluster.address, store=store.uri, overrides=["cluster.workers=8", *EIGHT])
    assert cluster.jobs == []
    assert store.runs() == []


EIGHT = [f"stages.{stage}.train.global_batch=8" for stage in ("base", "chat")]


def test_another_version_is_refused_and_both_are_named(cluster: Cluster, docs: Path, store: Store) -> None:
    cluster.their_version = "9.9.9"
    mine = version("trainwright")
    with pytest.raises(RequestError, match=rf"versions differ: trainwright {mine} here, 9\.9\.9 on the cluster"):
        submit(docs, address=cluster.address, store=store.uri)
    assert store.runs() == []


def test_a_wrong_token_is_refused_in_words(
    cluster: Cluster, docs: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
    with pytest.raises(RequestError, match="refuses the token; set RAY_AUTH_TOKEN"):
        submit(docs, address=cluster.address, store=store.uri)


def test_nothing_there_is_a_lack_of_capacity(docs: Path, store: Store) -> None:
    with pytest.raises(CapacityError, match="no job server answers"):
        submit(docs, address="http://127.0.0.1:9", store=store.uri)


def test_a_cluster_address_is_no_job_server(docs: Path, store: Store) -> None:
    assert not is_job_server("10.0.0.1:6379")
    with pytest.raises(RequestError, match=r"as in http://HEAD:8265"):
        submit(docs, address="10.0.0.1:6379", store=store.uri)


def test_local_files_do_not_travel(cluster: Cluster, recipe: Path, store: Store) -> None:
    with pytest.raises(RecipeError) as refused:
        submit(recipe, address=cluster.address, store=store.uri)
    assert {problem.field for problem in refused.value.problems} == {
        "stages.base.data",
        "stages.chat.data",
        "stages.exam.text",
    }
    assert cluster.jobs == []


def test_a_job_that_ends_before_its_run_begins_is_lost_and_can_be_submitted_again(
    cluster: Cluster, docs: Path, store: Store
) -> None:
    run = submit(docs, address=cluster.address, store=store.uri)
    cluster.status = "FAILED"
    (summary,) = api.status(run, store=store.uri)
    assert (summary.state, summary.message) == ("lost", "its job ended as FAILED: why")
    api.resume(run, store=store.uri)
    assert len(cluster.jobs) == 4
    assert [event["event"] for event in RunRecord.open(store, run).events()] == ["run_submitted"] * 2


def test_a_submitted_run_is_resumed_with_other_placement(cluster: Cluster, docs: Path, store: Store) -> None:
    """The job reads the run's folder, so that is where the new number has to be."""
    run = submit(docs, address=cluster.address, store=store.uri)
    cluster.status = "FAILED"
    api.resume(run, overrides=["cluster.workers=1", "stages.chat.train.save_every=3"], store=store.uri)
    resolved = RunRecord.open(store, run).resolved()
    assert resolved.recipe.cluster.workers == 1
    assert resolved.recipe.stages["chat"].train.save_every == 3
    assert len(cluster.jobs) == 4
    api.resume(run, overrides=["cluster.workers=auto"], store=store.uri)
    assert RunRecord.open(store, run).resolved().recipe.cluster.workers == 2


def test_what_a_submitted_run_cannot_be_resumed_with_is_refused_before_anything_is_submitted(
    cluster: Cluster, docs: Path, store: Store
) -> None:
    run = submit(docs, address=cluster.address, store=store.uri)
    cluster.status = "FAILED"
    for overrides, kind, message in [
        (["stages.chat.train.steps=5"], RequestError, r"stages\.chat\.train\.steps: 4 in the run, 5 at present"),
        (["cluster.wokers=1"], RequestError, r"the run's recipe has no cluster\.wokers"),
        (["cluster.workers=3"], RecipeError, r"cluster\.workers"),
        (["cluster.workers=many"], RecipeError, r"cluster\.workers"),
        (["cluster.workers=8", *EIGHT], RequestError, r"train\.global_batch: 4 in the run, 8 at present"),
        (["cluster.workers=4"], CapacityError, r"needs 4 CPU \(4 workers\); the cluster has 3 CPU on 1 nodes?"),
    ]:
        cluster.cpus = [3.0]
        with pytest.raises(kind, match=message):
            api.resume(run, overrides=overrides, store=store.uri)
    assert len(cluster.jobs) == 2
    assert RunRecord.open(store, run).folder.find("recipe-2.json") is None


def test_without_the_token_a_submitted_run_stays_what_it_was(
    cluster: Cluster, docs: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submit(docs, address=cluster.address, store=store.uri)
    cluster.status = "FAILED"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
    assert [summary.state for summary in api.status(run, store=store.uri)] == ["submitted"]


def test_a_run_that_has_not_begun_is_stopped_at_the_job_server(cluster: Cluster, docs: Path, store: Store) -> None:
    run = submit(docs, address=cluster.address, store=store.uri)
    cluster.status = "RUNNING"
    api.stop(run, store=store.uri, wait=False)
    assert cluster.stopped == ["job_2"]


def test_the_token_is_found_where_ray_looks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() is None
    (tmp_path / "token").write_text("secret\n")
    assert find_token() == "secret"
