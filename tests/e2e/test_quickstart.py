"""What a user of the quickstart sees: one command makes everything, the same command again makes nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.main import app
from launch.sampling.text import sample_texts
from recipes.errors import RequestError
from tests.e2e.shell import SmokeRun

pytestmark = pytest.mark.serial

STAGES = ["base", "sft", "reward", "second_reward", "policy", "eval"]
WORKERS = ("--set", "cluster.workers=2", "--set", "cluster.gpus_per_worker=0")


def test_the_chain_runs_and_says_what_it_does(smoke_run: SmokeRun, say: Callable[[str], None]) -> None:
    say(f"quickstart --smoke took {smoke_run.done.seconds:.0f} s")
    lines = smoke_run.done.out.splitlines()
    assert any(line.startswith("plan of quickstart") for line in lines)
    for stage in STAGES:
        assert any(re.match(rf"{stage}: committed in ", line) for line in lines), smoke_run.done.out
    assert lines[-1].startswith("report: ")
    assert smoke_run.done.err == ""
    (status,) = smoke_run.shell("status", "--json").json
    assert status["state"] == "completed"
    assert [(stage["name"], stage["state"]) for stage in status["stages"]] == [(name, "committed") for name in STAGES]


def test_the_report_is_one_page_with_everything(smoke_run: SmokeRun) -> None:
    page = Path(smoke_run.done.out.splitlines()[-1].removeprefix("report: ")).read_text()
    assert page.count("<figure") >= 10
    for text in ("Before and after", "kl", "entropy", "length mean", "score mean", "held out", "rows in"):
        assert text in page
    assert not re.search(r"(src|href)=[\"'](?!#)", page)


def test_the_store_tells_what_was_made_of_what(smoke_run: SmokeRun) -> None:
    listed = {item["stage"]: item for item in smoke_run.shell("store", "ls", "--json").json}
    assert [listed[stage]["kind"] for stage in STAGES] == [
        "model", "adapter", "reward_model", "reward_model", "actor_critic", "report"
    ]  # fmt: skip
    assert listed["policy"]["parents"] == {
        "actor": listed["sft"]["fingerprint"],
        "rewards.judge.model": listed["reward"]["fingerprint"],
    }
    assert smoke_run.shell("store", "verify").code == 0


def test_the_same_command_again_starts_no_worker(smoke_run: SmokeRun, quickstart: Path) -> None:
    again = smoke_run.shell("run", str(quickstart), "--smoke", *WORKERS)
    assert again.code == 0
    events = [line.partition(" · ")[0] for line in again.out.splitlines()]
    assert [event for event in events if event.endswith(": cached")] == [f"{stage}: cached" for stage in STAGES]
    assert again.seconds < 5, f"{again.seconds:.1f} s"
    newest = smoke_run.shell("status", "last", "--json").json[0]
    assert [stage["attempts"] for stage in newest["stages"]] == [0] * 6


def test_resume_of_a_finished_run_says_so(smoke_run: SmokeRun) -> None:
    done = smoke_run.shell("resume", smoke_run.run)
    assert done.code == 0
    assert "is already completed" in done.out


def test_a_change_of_the_policy_plans_policy_and_evaluation_only(smoke_run: SmokeRun, quickstart: Path) -> None:
    changed = ("--set", "stages.policy.algorithm.kl_coef=0.1", "--store", str(smoke_run.shell.store))
    planned = CliRunner().invoke(app, ["plan", str(quickstart), "--smoke", *WORKERS, *changed, "--json"])
    assert planned.exit_code == 0, planned.output
    stages = {stage["name"]: stage["cached"] for stage in json.loads(planned.stdout)["stages"]}
    assert stages == {**dict.fromkeys(STAGES[:4], True), "policy": False, "eval": False}


@pytest.mark.long
def test_a_change_of_the_policy_runs_policy_and_evaluation_only(smoke_run: SmokeRun, quickstart: Path) -> None:
    done = smoke_run.shell("run", str(quickstart), "--smoke", *WORKERS, "--set", "stages.policy.algorithm.kl_coef=0.1")
    assert done.code == 0, done.out + done.err
    (newest,) = smoke_run.shell("status", "last", "--json").json
    assert {stage["name"]: stage["state"] for stage in newest["stages"]} == {
        **dict.fromkeys(STAGES[:4], "cached"),
        "policy": "committed",
        "eval": "committed",
    }


def test_samples_are_a_function_of_prompt_and_seed(smoke_run: SmokeRun) -> None:
    """In two processes: the command's, and this one."""
    arguments = ("sample", f"{smoke_run.run}/policy", "--prompt", "What does len(obj) do?", "--chat", "--json")
    first = smoke_run.shell(*arguments)
    assert first.code == 0, first.err
    second = CliRunner().invoke(app, [*arguments, "--store", str(smoke_run.shell.store)])
    assert first.out == second.stdout
    assert first.json[0]["response"]
    with pytest.raises(RequestError, match="sampled"):
        sample_texts(f"{smoke_run.run}/reward", ["x"], store=str(smoke_run.shell.store))


def test_logs_are_kept_by_stage(smoke_run: SmokeRun) -> None:
    everything = smoke_run.shell("logs", smoke_run.run)
    assert everything.code == 0
    assert "run_finished state=completed" in everything.out
    assert smoke_run.shell("logs", smoke_run.run, "base").code == 0
