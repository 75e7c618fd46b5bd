"""The command line: exit codes, `--json` forms, error texts, and what it never imports."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch.bench import Bench


def test_check_of_a_right_recipe(call: Any, recipe: Path) -> None:
    code, out, err = call("check", str(recipe))
    *rows, summary = out.splitlines()
    assert (code, summary, err) == (0, f"{recipe}: no problems found", "")
    assert [line for line in rows if not line.startswith(" ")] == [
        "base.data, text.txt", "chat.data, text.txt", "eval.text, text.txt",
    ]  # fmt: skip
    assert all(line.endswith("<|end|>") for line in rows if line.startswith("  target"))


def test_check_names_file_line_field_and_value_of_everything(call: Any, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("steps: 4", "stepz: 4").replace("kind: finetune", "kind: finetun"))
    code, _, err = call("check", str(recipe))
    assert code == 2
    assert f"{recipe}:11: stages.base.train.stepz: unknown key (found 4); did you mean steps? [unknown-key]" in err
    assert f"{recipe}:13: stages.chat.kind" in err
    code, out, _ = call("check", str(recipe), "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (2, False)
    assert {(problem["code"], problem["field"]) for problem in found["problems"]} >= {
        ("unknown-key", "stages.base.train.stepz"),
        ("unknown-choice", "stages.chat.kind"),
    }


def test_check_with_a_store_says_what_there_is_to_do(call: Any, recipe: Path, tmp_path: Path) -> None:
    code, out, _ = call("check", str(recipe), "--store", str(tmp_path / "store"), "--set", "cluster.workers=1")
    assert code == 0
    assert "3 of 3 stages to compute on 1 CPU worker" in out


def test_check_refuses_more_workers_than_there_are(call: Any, recipe: Path, tmp_path: Path) -> None:
    arguments = ("--store", str(tmp_path / "store"), "--set", "cluster.workers=4096")
    recipe.write_text(recipe.read_text().replace("global_batch: 4", "global_batch: 4096"))
    code, _, err = call("check", str(recipe), *arguments)
    assert code == 3
    assert "cluster.workers" in err
    assert "[cluster-too-small]" in err


def test_check_refuses_a_store_that_cannot_be_written(call: Any, recipe: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = call("check", str(recipe), "--store", str(blocked / "store"))
    assert code == 3
    assert str(blocked) in err
    assert "[store-not-usable]" in err


def test_check_with_both_wrong_ends_with_two(call: Any, recipe: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = call("check", str(recipe), "--set", "seed=x", "--store", str(blocked / "store"))
    assert code == 2
    assert "seed" in err
    assert str(blocked) in err


def test_check_compares_the_predicted_bytes_with_free_space(
    call: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.store.store import Store

    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 20)
    code, _, err = call("check", str(recipe), "--store", str(tmp_path / "store"), "--set", "cluster.workers=1")
    assert code == 3
    assert "1 MiB free" in err
    assert "[store-too-small]" in err


def test_plan_json(call: Any, recipe: Path) -> None:
    code, out, _ = call("plan", str(recipe), "--json", "--set", "cluster.workers=1")
    planned = json.loads(out)
    assert code == 0
    assert [stage["name"] for stage in planned["stages"]] == ["base", "chat", "eval"]
    assert planned["stages"][0]["cached"] is False
    assert len(planned["stages"][0]["fingerprint"]) == 64


def test_plan_table(call: Any, recipe: Path) -> None:
    code, out, _ = call("plan", str(recipe))
    assert code == 0
    assert "plan of toy" in out
    assert out.count("to run") == 3


def test_status_json_lists_runs_oldest_first(call: Any, bench: Bench) -> None:
    first, _ = bench.drive()
    second, _ = bench.drive()
    code, out, _ = call("status", "--json", "--store", bench.store.uri)
    listed = json.loads(out)
    assert code == 0
    assert [item["run"] for item in listed] == [first.run, second.run]
    assert listed[0]["recipe"] == "toy"
    assert listed[0]["state"] == "completed"
    assert [stage["state"] for stage in listed[0]["stages"]] == ["committed"] * 3
    assert [stage["name"] for stage in listed[1]["stages"]] == ["base", "chat", "eval"]


def test_status_of_one_run_in_words(call: Any, bench: Bench) -> None:
    record, _ = bench.drive()
    code, out, _ = call("status", "last", "--store", bench.store.uri)
    assert code == 0
    assert f"{record.run}  completed  3/3 stages" in out
    assert "report.html" in out


def test_store_ls_json(call: Any, bench: Bench) -> None:
    bench.drive()
    code, out, _ = call("store", "ls", "--json", "--store", bench.store.uri)
    listed = {item["stage"]: item for item in json.loads(out)}
    assert code == 0
    assert listed["chat"]["kind"] == "model"
    assert listed["chat"]["parents"] == {"init_from": listed["base"]["fingerprint"]}
    assert set(listed["base"]) >= {"fingerprint", "kind", "stage", "files", "bytes", "parents"}
    assert len(listed["base"]["files"]["model/weights.bin"]) == 64
    assert listed["base"]["bytes"] > 0


def test_a_store_that_is_not_there_holds_nothing(call: Any, tmp_path: Path) -> None:
    assert call("store", "ls", "--json") == (0, "[]\n", "")
    code, out, _ = call("store", "ls")
    assert (code, out) == (0, f"{tmp_path / 'store'} holds no artifacts\n")
    assert call("store", "show", "deadbeef99")[0] == 2
    assert not (tmp_path / "store").exists()


def test_store_show_lineage_and_verify(call: Any, bench: Bench) -> None:
    record, driven = bench.drive()
    at = ("--store", bench.store.uri)
    code, out, _ = call("store", "show", f"{record.run}/chat", *at)
    assert code == 0
    assert driven.results["chat"].manifest.digest in out
    code, out, _ = call("store", "lineage", f"{record.run}/chat", "--json", *at)
    found = json.loads(out)
    assert [item["stage"] for item in found["ancestors"]] == ["base"]
    assert [item["stage"] for item in found["descendants"]] == ["eval"]
    assert call("store", "verify", *at)[0] == 0


def test_a_damaged_object_ends_verify_with_five(call: Any, bench: Bench) -> None:
    bench.drive()
    entry = bench.store.list_artifacts()[0].files["model/weights.bin"]
    path = bench.store.objects.local_path(entry.sha256)
    path.chmod(0o644)
    path.write_bytes(b"x" * entry.bytes)
    code, _, err = call("store", "verify", "--store", bench.store.uri)
    assert code == 5
    assert entry.sha256[2:10] in err


def test_a_name_can_stand_in_a_recipe(call: Any, bench: Bench) -> None:
    record, driven = bench.drive()
    code, out, _ = call("store", "name", "good-one", f"{record.run}/base", "--store", bench.store.uri)
    assert (code, "store://good-one" in out) == (0, True)
    code, out, _ = call("store", "show", "store://good-one", "--json", "--store", bench.store.uri)
    assert json.loads(out)["fingerprint"] == driven.results["base"].manifest.fingerprint


def test_unknown_runs_stages_and_artifacts_end_with_two(call: Any, bench: Bench) -> None:
    record, _ = bench.drive()
    at = ("--store", bench.store.uri)
    for arguments, named in (
        (("status", "nothing"), "no run 'nothing'"),
        (("resume", "nothing"), "no run 'nothing'"),
        (("store", "show", f"{record.run}/nothing"), "it has base, chat, eval"),
        (("store", "show", "deadbeef99"), "no artifact 'deadbeef99'"),
        (("stop", record.run), "it is completed"),
    ):
        code, _, err = call(*arguments, *at)
        assert code == 2
        assert named in err
        assert "Traceback" not in err


def test_report_is_written_again(call: Any, bench: Bench, tmp_path: Path) -> None:
    record, _ = bench.drive()
    (record.local_folder / "report.html").unlink()
    code, out, _ = call("report", record.run, "--store", bench.store.uri)
    assert code == 0
    assert Path(out.strip()).read_text().startswith("<!doctype html>")
    code, out, _ = call("report", record.run, "--store", bench.store.uri, "-o", str(tmp_path / "x" / "page.html"))
    assert (tmp_path / "x" / "page.html").is_file()


def test_logs_tell_the_drivers_notes(call: Any, bench: Bench) -> None:
    record, _ = bench.drive()
    (record.local_folder / "logs" / "chat-1-rank-0.log").write_text("hello\n")
    (record.local_folder / "logs" / "base-1-verify-rank-0.log").write_text("checked\n")
    code, out, _ = call("logs", record.run, "--store", bench.store.uri)
    assert code == 0
    assert "stage_committed" in out
    assert "chat-1-rank-0: hello" in out
    _, out, _ = call("logs", record.run, "base", "--store", bench.store.uri)
    assert out == "base-1-verify-rank-0: checked\n"


def test_schema_is_json_schema(call: Any) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert "stages" in json.loads(out)["properties"]


def test_a_bug_shows_where_its_traceback_is(
    call: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import launch.checks.preflight

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def broken(*arguments: Any, **settings: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(launch.checks.preflight, "check", broken)
    code, _, err = call("check", str(recipe))
    assert code == 1
    assert "ZeroDivisionError: oops" in err
    kept = Path(err.split("The traceback is in ")[1].strip())
    assert "broken" in kept.read_text()


@pytest.mark.parametrize(("arguments", "read_by"), [(["--help"], set()), (["check", "RECIPE"], {"numpy"})])
def test_light_commands_import_nothing_heavy(arguments: list[str], read_by: set[str], recipe: Path) -> None:
    """`check` reads rows by what trains, whose arrays are numpy's."""
    script = (
        "import sys, launch.cli.main as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = {sorted({'torch', 'ray', 'deepspeed', 'transformers', 'peft', 'datasets', 'numpy'} - read_by)}\n"
        "heavy = set(heavy) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    filled = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", script, *filled], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_store_pins_and_collects(call: Any, bench: Bench) -> None:
    record, _ = bench.drive()
    at = ("--store", bench.store.uri)
    code, out, _ = call("store", "pin", f"{record.run}/base", "--note", "paper", "--json", *at)
    assert code == 0
    base = json.loads(out)[0]
    assert base["note"] == "paper"
    assert call("store", "pin", *at)[1] == f"pinned {base['fingerprint']}  paper\n"
    bench.store.objects.put_bytes(b"orphan")
    code, out, _ = call("store", "gc", "--dry-run", "--json", *at)
    found = json.loads(out)
    assert (code, found["dry_run"], found["waiting_objects"], found["waiting_bytes"]) == (0, True, 1, 6)
    code, out, _ = call("store", "gc", "--grace", "0", "--keep-runs", "0", *at)
    assert code == 0
    assert "deleted 0 refs and 0 objects" in out
    assert "in 0 hours" in out
    for _ in range(3):
        call("store", "gc", "--grace", "0", "--keep-runs", "0", *at)
    assert [item.stage for item in bench.store.list_artifacts()] == ["base"]
    code, out, _ = call("store", "unpin", base["fingerprint"], *at)
    assert (code, base["fingerprint"] in out) == (0, True)
    code, _, err = call("store", "unpin", base["fingerprint"], *at)
    assert code == 2
    assert "is not pinned" in err


def test_store_carries_bundles(call: Any, bench: Bench, tmp_path: Path) -> None:
    record, _ = bench.drive()
    at = ("--store", bench.store.uri)
    code, out, _ = call("store", "export", f"{record.run}/chat", str(tmp_path / "b"), "--bundle", "--lineage", *at)
    assert code == 0
    assert out.splitlines()[-1] == f"digest {bench.store.resolve(json_of(record, 'chat')).digest}"
    other = ("--store", str(tmp_path / "other"))
    code, _, err = call("store", "import", str(tmp_path / "b"), *other)
    assert code == 2
    assert "weights.bin" in err
    code, _, err = call("store", "import", str(tmp_path / "b"), "--digest", "ab" * 32, *other)
    assert code == 2
    assert "ab" * 32 in err
    code, _, err = call("store", "export", f"{record.run}/chat", str(tmp_path / "c"), "--lineage", *at)
    assert (code, "--lineage goes with --bundle" in err) == (2, True)


def json_of(record: Any, stage: str) -> str:
    """The fingerprint that a run planned for a stage."""
    return next(str(entry["fingerprint"]) for entry in record.raw["plan"] if entry["name"] == stage)


@pytest.mark.parametrize(("exit_code", "is_shown"), [(2, False), (4, True)])
def test_a_worker_s_traceback_is_left_out_where_the_request_is_wrong(
    call: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, is_shown: bool
) -> None:
    import launch.checks.preflight
    from cluster.protocol import Verdict, WorkerFailed

    def refused(*arguments: Any, **settings: Any) -> None:
        verdict = Verdict(kind="exception", message="5.png: cut off", rank=0, traceback="in f", exit_code=exit_code)
        raise WorkerFailed(verdict)

    monkeypatch.setattr(launch.checks.preflight, "check", refused)
    code, _, err = call("check", str(recipe))
    assert code == exit_code
    assert err.startswith("5.png: cut off")
    assert ("in f" in err) is is_shown


def test_an_output_that_cannot_be_written_is_no_bug(recipe: Path) -> None:
    program = "from launch.cli.main import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (3, "the output cannot be written: No space left on device\n")
