"""A recipe submitted from one host to a cluster of others: equal artifacts, closed ports, a node lost for good."""

import json
import time
from typing import Any

import pytest

from launch.records.record import RunRecord
from tests.cluster.conftest import CLIENT, NODES
from tests.cluster.hosts import DASHBOARD_PORT, STORE, Lab, wait
from trainers.store.store import Store

pytestmark = [pytest.mark.serial, pytest.mark.long, pytest.mark.timeout(900)]

RECIPE = """
name: hosts
seed: 3
cluster: {workers: 3, gpus_per_worker: 0}
stages:
  base:
    kind: pretrain
    architecture:
      {family: decoder, type: llama, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64,
       num_attention_heads: 2, max_position_embeddings: 64}
    tokenizer: {train: bpe, vocab_size: 400}
    data: {source: python-docs, split: train, limit: 300}
    shard: {precision: fp32}
    train: {steps: 400, global_batch: 12, sequence_length: 64, optimizer: {lr: 1e-3}, save_every: 10}
"""


class Client:
    """Commands of a user who works on the client."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.address = f"http://{lab.hosts[NODES[0]].address}:{DASHBOARD_PORT}"
        (lab.recipes / "hosts.yaml").write_text(RECIPE)

    def submit(self, *settings: str) -> str:
        """Submit the recipe; returns the run's id."""
        command = ["submit", "hosts.yaml", "--address", self.address]
        return self.lab.hosts[CLIENT].trainwright(*command, *_set(settings)).stdout.strip()

    def resume(self, run: str, *settings: str) -> None:
        """Resume a submitted run."""
        self.lab.hosts[CLIENT].trainwright("resume", run, *_set(settings))

    def events(self, run: str, event: str) -> list[dict[str, Any]]:
        """Entries of one kind in the run's journal, oldest first."""
        found = RunRecord.open(Store.open(str(self.lab.store)), run).events()
        return [entry for entry in found if entry["event"] == event]

    def wait_for_step(self, run: str, step: int) -> None:
        """Wait until the stage has come that far."""

        def reached() -> int:
            return max((entry.get("step") or 0 for entry in self.events(run, "progress")), default=0)

        wait(lambda: reached() >= step, f"step {step} of {run}", 300)

    def wait_for_end(self, run: str, times: int = 1) -> str:
        """Wait until the run has ended that often; returns its state."""
        wait(lambda: len(self.events(run, "run_finished")) >= times, f"end {times} of {run}", 300)
        return str(self.events(run, "run_finished")[-1]["state"])

    def digest(self, run: str) -> str:
        """Digest of what the run made."""
        return str(self.events(run, "stage_committed")[-1]["digest"])


def _set(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_a_cluster_of_hosts_makes_what_one_host_makes_and_leaves_no_port_open(lab: Lab) -> None:
    """Two ranks of two hosts, seen while they train: nothing of a rank listens on all addresses."""
    client = Client(lab)
    run = client.submit("cluster.workers=2", "stages.base.train.steps=60")
    client.wait_for_step(run, 5)
    listening = {name: lab.hosts[name].listeners() for name in NODES}
    ranks = {name: addresses for name, addresses in listening.items() if addresses}
    assert len(ranks) == 2, f"ranks listen on {listening}"
    for name, addresses in ranks.items():
        own = (f"{lab.hosts[name].address}:", "127.0.0.1:")
        assert all(address.startswith(own) for address in addresses), f"{name}: {addresses}"
    assert client.wait_for_end(run) == "completed"
    alone = ["run", "hosts.yaml", "--store", f"{STORE}/alone", "--set", "cluster.workers=2"]
    lab.hosts[CLIENT].trainwright(*alone, "--set", "stages.base.train.steps=60")
    (made,) = Store.open(str(lab.store / "alone")).list_artifacts()
    assert client.digest(run) == made.digest


def test_a_run_that_lost_a_host_resumes_on_the_hosts_that_are_left(lab: Lab) -> None:
    client = Client(lab)
    run = client.submit()
    client.wait_for_step(run, 30)
    lab.hosts[NODES[2]].crash()
    assert client.wait_for_end(run) == "failed"
    failed = client.events(run, "stage_failed")[0]
    assert failed["verdict"]["kind"] == "lost"
    assert lab.hosts[NODES[2]].address in json.dumps(failed["verdict"])
    client.resume(run, "cluster.workers=2")
    assert client.wait_for_end(run, times=2) == "completed"
    workers = [entry["workers"] for entry in client.events(run, "stage_started")]
    assert (workers[0], workers[-1]) == (3, 2)
    steps = [
        entry["step"] for entry in client.events(run, "progress") if entry["at"] > failed["at"] and entry.get("step")
    ]
    assert min(steps) >= 20, "began at the first step"


def test_a_host_that_is_cut_off_is_noticed_in_seconds_and_another_takes_its_place(lab: Lab) -> None:
    """Before the verdict `status` says who does not answer; the steps are those of an undisturbed run."""
    client = Client(lab)
    run = client.submit("cluster.workers=2")
    client.wait_for_step(run, 30)
    (cut,) = [lab.hosts[name] for name in NODES[1:] if lab.hosts[name].listeners()][:1]
    cut_at = time.time()
    cut.set_link(up=False)
    wait(lambda: client.events(run, "waiting"), "who does not answer", 15)
    said = lab.hosts[CLIENT].trainwright("status", run).stdout
    assert cut.address in said
    wait(lambda: client.events(run, "stage_failed"), "the verdict", 30)
    failed = client.events(run, "stage_failed")[0]
    assert failed["verdict"]["kind"] == "lost"
    assert cut.address in json.dumps(failed["verdict"])
    assert failed["at"] - cut_at < 15
    assert failed["retry"] is True
    assert client.wait_for_end(run) == "completed"
    alone = ["run", "hosts.yaml", "--store", f"{STORE}/alone", "--set", "cluster.workers=2"]
    lab.hosts[CLIENT].trainwright(*alone)
    (made,) = Store.open(str(lab.store / "alone")).list_artifacts()
    assert client.digest(run) == made.digest


def test_a_run_shrinks_when_a_host_is_lost_and_grows_back_when_it_returns(lab: Lab) -> None:
    client = Client(lab)
    elastic = ("cluster.min_workers=2", "cluster.replacement_wait_s=5", "stages.base.train.steps=2000")
    run = client.submit(*elastic)
    client.wait_for_step(run, 30)
    cut = lab.hosts[NODES[2]]
    cut.set_link(up=False)
    wait(lambda: len(client.events(run, "stage_started")) == 2, "fewer workers", 90)
    cut.set_link(up=True)
    assert client.wait_for_end(run) == "completed"
    assert [entry["workers"] for entry in client.events(run, "stage_started")] == [3, 2, 3]
    (made,) = client.events(run, "stage_committed")
    assert made["exactness"].startswith("order-exact")
    assert all(change in made["exactness"] for change in ("workers: 3, then 2", "workers: 2, then 3"))
    assert made["outcome"]["steps_done"] == 2000
