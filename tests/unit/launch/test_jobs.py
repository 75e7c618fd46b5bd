"""Submission against a job server that is played: what is asked, what is refused, and what is never written then."""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cluster.topology import Node
from launch import api
from launch.capacity.job_server import find_token, is_job_server
from launch.inputs.uploaded import uploaded_folder
from launch.jobs.shared_files import ANSWER, look, read_question
from launch.jobs.submit import submit
from launch.records.record import RunRecord
from recipes.errors import CapacityError, RecipeError, RequestError
from tests.unit.launch.bench import Bench
from trainers.data.source_digest import source_digest
from trainers.store.collection import Keep, collect
from trainers.store.store import Store

TOKEN = "a-token"


class Cluster:
    """What the played job server has and was asked."""

    def __init__(self) -> None:
        self.cpus = [2.0, 2.0, 2.0]
        self.their_version = version("trainwright")
        self.bf16: str | None = ""
        """What makes its nodes fast in bf16; None: they do not answer."""
        self.jobs: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.status = "SUCCEEDED"
        self.address = ""
        self.folders: dict[str, Path] = {}
        """Node -> where it has what the submitting machine has elsewhere."""

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
            command = self.jobs[int(path.split("/")[-2].removeprefix("job_")) - 1]["entrypoint"].split()
            if "launch.jobs.shared_files" in command:
                return {"logs": f"{ANSWER}{json.dumps(self.look(command[-1]))}\n"}
            nodes = [asdict(Node(str(i), f"10.0.0.{i}", c, 0, 0, c, 0, self.bf16)) for i, c in enumerate(self.cpus)]
            said = f"nodes={json.dumps(nodes)}\n" if self.bf16 is not None else "ray went away\n"
            return {"logs": f"some noise\ntrainwright={self.their_version}\n{said}"}
        if path.endswith("/stop"):
            self.stopped.append(path.split("/")[-2])
            return {"stopped": True}
        return {"status": self.status, "message": "why"}

    def look(self, text: str) -> dict[str, list[str]]:
        """What its nodes find, each in its own folder."""
        asked = read_question(text)
        return {
            node: look([{**item, "base_dir": str(folder)} for item in asked]) for node, folder in self.folders.items()
        }


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


@pytest.mark.parametrize(("bf16", "precision"), [("amx_bf16", "bf16"), ("avx512_bf16", "fp32"), ("", "fp32")])
def test_what_the_clusters_processors_can_do_settles_the_precision(
    cluster: Cluster, docs: Path, store: Store, bf16: str, precision: str
) -> None:
    cluster.bf16 = bf16
    planned = api.plan(docs, address=cluster.address, store=store.uri)
    resolved = RunRecord.open(store, submit(docs, address=cluster.address, store=store.uri)).resolved()
    assert {stage.precision for stage in planned.stages} == {precision}
    assert {stage.shard.precision for stage in resolved.recipe.stages.values()} == {precision}
    assert [s.fingerprint for s in planned.stages] == [s.fingerprint for s in resolved.plan(store).stages]


def test_nodes_that_do_not_answer_settle_nothing(cluster: Cluster, docs: Path, store: Store) -> None:
    cluster.bf16 = None
    with pytest.raises(CapacityError, match=f"{cluster.address} .*: ray went away"):
        submit(docs, address=cluster.address, store=store.uri)
    assert store.runs() == []


def test_a_wrong_token_is_refused_in_words(
    cluster: Cluster, docs: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
    with pytest.raises(RequestError, match=f"{cluster.address} .*RAY_AUTH_TOKEN"):
        submit(docs, address=cluster.address, store=store.uri)


def test_nothing_there_is_a_lack_of_capacity(docs: Path, store: Store) -> None:
    with pytest.raises(CapacityError, match=r"http://127\.0\.0\.1:9: .*refused"):
        submit(docs, address="http://127.0.0.1:9", store=store.uri)


def test_a_cluster_address_is_no_job_server(docs: Path, store: Store) -> None:
    assert not is_job_server("10.0.0.1:6379")
    with pytest.raises(RequestError, match=r"as in http://HEAD:8265"):
        submit(docs, address="10.0.0.1:6379", store=store.uri)


def test_files_that_every_node_sees_stay_where_they_are(cluster: Cluster, recipe: Path, store: Store) -> None:
    """Looked for once, before the run is written; the nodes' own copies may have other times of change."""
    copy = recipe.parent / "copy"
    copy.mkdir()
    (copy / "text.txt").write_bytes((recipe.parent / "text.txt").read_bytes())
    cluster.folders = {"10.0.0.1": recipe.parent, "10.0.0.2": copy}
    said: list[str] = []
    run = submit(recipe, address=cluster.address, store=store.uri, say=said.append)
    assert said == ["1 data file (0.0 MiB) found on 2 nodes"]
    assert [job["metadata"]["trainwright"] for job in cluster.jobs] == ["handshake", "files", run]
    resolved = RunRecord.open(store, run).resolved()
    assert resolved.uploaded is None
    assert resolved.recipe.stages["base"].data.files == ["text.txt"]
    cluster.status = "FAILED"
    (copy / "text.txt").unlink()
    with pytest.raises(RecipeError, match=r"node 10\.0\.0\.2: .*text\.txt"):
        api.resume(run, store=store.uri)


def test_files_that_a_node_lacks_or_has_otherwise_are_named(cluster: Cluster, recipe: Path, store: Store) -> None:
    other, empty = recipe.parent / "other", recipe.parent / "empty"
    for folder in (other, empty):
        folder.mkdir()
    (other / "text.txt").write_text("other words\n")
    cluster.folders = {"10.0.0.1": recipe.parent, "10.0.0.2": other, "10.0.0.3": empty}
    with pytest.raises(RecipeError) as refused:
        submit(recipe, address=cluster.address, store=store.uri)
    problem, second = refused.value.problems
    assert (problem.code, problem.field, problem.found) == ("files-differ", "stages.base.data", "text.txt")
    assert f"node 10.0.0.2: {other / 'text.txt'}: " in problem.message
    assert second.code == "files-differ"
    assert "node 10.0.0.3: " in second.message
    assert f"looked in {empty}" in second.message
    assert "submit with --upload" in problem.suggestion
    assert store.runs() == []


def test_uploaded_files_are_read_from_the_store_and_change_no_fingerprint(
    cluster: Cluster, recipe: Path, store: Store, bench: Bench
) -> None:
    said: list[str] = []
    run = submit(recipe, address=cluster.address, store=store.uri, is_upload=True, say=said.append)
    assert said == [f"1 data file (0.0 MiB) uploaded to {store.uri}"]
    record = RunRecord.open(store, run)
    resolved, direct = record.resolved(), bench.resolve()
    assert [s.fingerprint for s in resolved.plan(None).stages] == [s.fingerprint for s in direct.plan(None).stages]
    text = (recipe.parent / "text.txt").read_bytes()
    (recipe.parent / "text.txt").unlink()
    for name, field in (("base", "data"), ("chat", "data"), ("eval", "text")):
        stage = resolved.recipe.stages[name]
        folder = uploaded_folder(store, resolved.uploaded, stage)
        assert folder is not None
        (place,) = getattr(stage, field).files
        assert (folder / place).read_bytes() == text
        assert source_digest(getattr(stage, field), folder) == direct.data[name][field]
    kept = collect(store, grace_s=0, keep=Keep(artifacts=[], runs=[run]), dry_run=True)
    assert kept.waiting_refs == []
    dropped = collect(store, grace_s=0, keep=Keep(artifacts=[], runs=[]), dry_run=True)
    assert [ref for ref in dropped.waiting_refs if resolved.uploaded in ref]


def test_uploaded_files_come_out_of_an_object_store(
    cluster: Cluster, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRAINWRIGHT_CACHE", str(tmp_path / "cache"))
    run = submit(recipe, address=cluster.address, store="memory://uploads", is_upload=True)
    store = Store.open("memory://uploads")
    resolved = RunRecord.open(store, run).resolved()
    assert resolved.uploaded is not None
    folder = uploaded_folder(store, resolved.uploaded, resolved.recipe.stages["base"])
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "0" / "0" / "text.txt").read_bytes() == (recipe.parent / "text.txt").read_bytes()


def test_an_uploaded_run_is_resumed_without_its_files_and_refuses_others(
    cluster: Cluster, recipe: Path, store: Store
) -> None:
    run = submit(recipe, address=cluster.address, store=store.uri, is_upload=True)
    cluster.status = "FAILED"
    stored = RunRecord.open(store, run).resolved()
    api.resume(run, recipe=recipe, overrides=["cluster.workers=1"], store=store.uri)
    resumed = RunRecord.open(store, run).resolved()
    assert resumed.recipe.cluster.workers == 1
    assert resumed.recipe.stages == stored.recipe.stages
    (recipe.parent / "text.txt").write_text("other words\n" * 20)
    with pytest.raises(RequestError, match=r"uploaded, and stages\.base\.data .*: text\.txt"):
        api.resume(run, recipe=recipe, store=store.uri)
    with pytest.raises(RequestError, match=r"uploaded, and stages\.base\.data .*: x\.txt"):
        api.resume(run, overrides=["stages.base.data.files=[x.txt]"], store=store.uri)
    (recipe.parent / "text.txt").unlink()
    api.resume(run, store=store.uri)
    assert [job["metadata"]["trainwright"] for job in cluster.jobs] == ["handshake", run] * 3


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
