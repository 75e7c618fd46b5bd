"""What a user of the quickstart sees: one command makes everything, the same command again makes nothing."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGES = ["base", "chat", "judge", "second", "policy", "exam"]
WORKERS = ("--set", "cluster.workers=2", "--set", "cluster.gpus_per_worker=0")

# Opens exported folders with stock classes in a process in which this project does not exist.
STOCK = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("recipes", "cluster", "trainers", "rlhf", "launch"):
            raise ImportError(name + " does not exist here")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
folder, kind = sys.argv[1:]
ids = torch.tensor([list(range(5, 25))])
if kind == "score":
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
elif kind == "adapter":
    from peft import PeftModel
    base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(folder)("print")["input_ids"]
with torch.no_grad():
    print(json.dumps(model.eval()(ids).logits.double().flatten().tolist()))
"""


def stock_logits(folder: Path, kind: str) -> list[float]:
    """Logits on fixed ids by stock classes alone."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(folder), kind], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    values: list[float] = json.loads(done.stdout.splitlines()[-1])
    return values


@pytest.mark.serial
def test_the_chain_runs_and_says_what_it_does(smoke_run: Any, say: Callable[[str], None]) -> None:
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


@pytest.mark.serial
def test_the_report_is_one_page_with_everything(smoke_run: Any) -> None:
    page = Path(smoke_run.done.out.splitlines()[-1].removeprefix("report: ")).read_text()
    assert page.count("<figure") >= 10
    for text in ("Before and after", "kl", "entropy", "length mean", "score mean", "held out", "rows in"):
        assert text in page
    assert not re.search(r"(src|href)=[\"'](?!#)", page)


@pytest.mark.serial
def test_the_store_tells_what_was_made_of_what(smoke_run: Any) -> None:
    listed = {item["stage"]: item for item in smoke_run.shell("store", "ls", "--json").json}
    assert [listed[stage]["kind"] for stage in STAGES] == [
        "model", "adapter", "reward_model", "reward_model", "actor_critic", "report"
    ]  # fmt: skip
    assert listed["policy"]["parents"] == {
        "actor": listed["chat"]["fingerprint"],
        "reward": listed["judge"]["fingerprint"],
    }
    assert smoke_run.shell("store", "verify").code == 0


@pytest.mark.serial
def test_the_same_command_again_starts_no_worker(smoke_run: Any, quickstart: Path) -> None:
    again = smoke_run.shell("run", str(quickstart), "--smoke", *WORKERS)
    assert again.code == 0
    events = [line.partition(" · ")[0] for line in again.out.splitlines()]
    assert [event for event in events if event.endswith(": cached")] == [f"{stage}: cached" for stage in STAGES]
    assert again.seconds < 5, f"{again.seconds:.1f} s"
    newest = smoke_run.shell("status", "last", "--json").json[0]
    assert [stage["attempts"] for stage in newest["stages"]] == [0] * 6


@pytest.mark.serial
def test_resume_of_a_finished_run_says_so(smoke_run: Any) -> None:
    done = smoke_run.shell("resume", smoke_run.run)
    assert done.code == 0
    assert "completed already" in done.out


@pytest.mark.serial
def test_a_change_of_the_policy_runs_policy_and_exam_only(smoke_run: Any, quickstart: Path) -> None:
    done = smoke_run.shell("run", str(quickstart), "--smoke", *WORKERS, "--set", "stages.policy.ppo.kl_coef=0.1")
    assert done.code == 0, done.out + done.err
    (newest,) = smoke_run.shell("status", "last", "--json").json
    assert {stage["name"]: stage["state"] for stage in newest["stages"]} == {
        **dict.fromkeys(STAGES[:4], "cached"),
        "policy": "committed",
        "exam": "committed",
    }


@pytest.mark.serial
def test_exports_open_with_stock_classes_and_give_the_same_logits(smoke_run: Any, tmp_path: Path) -> None:
    shell, run = smoke_run.shell, smoke_run.run
    adapter, merged, judge, base = (tmp_path / name for name in ("adapter", "merged", "judge", "base"))
    assert shell("store", "export", f"{run}/chat", str(adapter)).code == 0
    assert shell("store", "export", f"{run}/chat", str(merged), "--merge").code == 0
    assert shell("store", "export", f"{run}/judge", str(judge), "--merge").code == 0
    assert shell("store", "export", f"{run}/base", str(base)).code == 0
    from_adapter, from_merged = stock_logits(adapter, "adapter"), stock_logits(merged, "model")
    assert max(abs(a - b) for a, b in zip(from_adapter, from_merged, strict=True)) < 1e-5
    from_base = stock_logits(base, "model")
    assert max(abs(a - b) for a, b in zip(from_adapter, from_base, strict=True)) > 1e-4
    assert len(stock_logits(judge, "score")) == 1


@pytest.mark.serial
def test_samples_are_a_function_of_prompt_and_seed(smoke_run: Any) -> None:
    arguments = ("sample", f"{smoke_run.run}/policy", "--prompt", "What does len(obj) do?", "--chat", "--json")
    first, second = smoke_run.shell(*arguments), smoke_run.shell(*arguments)
    assert first.code == 0, first.err
    assert first.out == second.out
    assert first.json[0]["response"]
    refused = smoke_run.shell("sample", f"{smoke_run.run}/judge", "--prompt", "x")
    assert refused.code == 2
    assert "only a language model can be sampled" in refused.err


@pytest.mark.serial
def test_logs_are_kept_by_stage(smoke_run: Any) -> None:
    everything = smoke_run.shell("logs", smoke_run.run)
    assert everything.code == 0
    assert "run_finished state=completed" in everything.out
    assert smoke_run.shell("logs", smoke_run.run, "base").code == 0
