"""Tests of code that a model wrote: what they are worth, and that nothing in the sandbox reaches out of it."""

import os
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from recipes.errors import RequestError
from recipes.stages.benchmarks.code import CodeProblems, pass_at
from recipes.stages.rewards.union import RewardTerm
from recipes.stages.rewards.unit_tests import Attempt, SandboxLimits, code_block
from rlhf.rewards.terms import open_text_terms, term_finding
from rlhf.sandbox import kernel
from rlhf.sandbox.runner import run_tests, sandbox_finding

TERM: TypeAdapter[Any] = TypeAdapter(RewardTerm)
LIMITS = SandboxLimits(wall_s=1, cpu_s=1, memory_mib=128, disk_mib=4, processes=8, output_bytes=2000)

needs_sandbox = pytest.mark.skipif(sandbox_finding() is not None, reason=f"{sandbox_finding()}")

ESCAPES = {
    "read passwords": ("open('/etc/shadow').read()", "FileNotFoundError"),
    "read the home folder": (f"import os; os.listdir({str(Path.home())!r} + '/.ssh')", "FileNotFoundError"),
    "read this file": (f"open({__file__!r}).read()", "FileNotFoundError"),
    "see processes": ("import os; os.listdir('/proc')", "FileNotFoundError"),
    "open a socket": ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError"),
    "write outside": ("open('/usr/lib/written', 'w')", "OSError"),
    "write at the root": ("open('/written', 'w')", "OSError"),
    "start a program": ("import os; os.execv('/usr/lib/python', ['python'])", "PermissionError"),
    "fork without end": ("import os\nwhile True: os.fork()", "BlockingIOError"),
    "fill memory": ("held = []\nwhile True: held.append(bytearray(1 << 22))", "MemoryError"),
    "fill the disk": ("file = open('/tmp/x', 'wb')\nwhile True: file.write(bytes(1 << 20))", "OSError"),
    "fill it with files": ("for n in range(10**6): open(f'/tmp/{n}', 'wb').write(bytes(5000))", "OSError"),
    "kill its parent": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "raise its limits": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError"),
    "end well before the test": ("import os; os._exit(0)", ""),
    "leave before the test": ("raise SystemExit(0)", "SystemExit"),
    "sleep": ("import time; time.sleep(3600)", "wall"),
    "print without end": ("while True: print('x' * 1000)", "wall"),
    "fill memory by many": (
        "import os, time\nfor _ in range(5):\n  if not os.fork(): break\nheld = bytearray(60 << 20)\ntime.sleep(3600)",
        "memory",
    ),
}


@needs_sandbox
def test_nothing_breaks_out_and_the_next_one_is_tested() -> None:
    attempts = [Attempt(code, ("pass",)) for code, _ in ESCAPES.values()]
    *found, good = run_tests([*attempts, Attempt("def f(): return 1", ("assert f() == 1",))], LIMITS, parallel=2)
    for (name, (_, how)), tested in zip(ESCAPES.items(), found, strict=True):
        assert tested.passed == (False,), name
        assert how in (tested.why[0], *tested.said[0].replace(":", " ").split(), ""), (name, tested)
        assert len(tested.said[0]) <= LIMITS.output_bytes
    assert good.passed == (True,)


@needs_sandbox
def test_what_one_test_leaves_behind_is_ended_before_the_next() -> None:
    code = (
        "import os, time\nif not os.path.exists('/tmp/first'):\n    open('/tmp/first', 'w')\n"
        "    if os.fork() == 0:\n        time.sleep(0.2); open('/tmp/late', 'w'); time.sleep(3600)"
    )
    later = "import os, time; time.sleep(0.4); assert not os.path.exists('/tmp/late')"
    began = time.monotonic()
    (found,) = run_tests([Attempt(code, ("pass", later))], LIMITS)
    assert found.passed == (True, True)
    assert time.monotonic() - began < 60


@needs_sandbox
def test_code_that_passes_a_test_that_nothing_can_pass_has_passed_none() -> None:
    forging = "import os, sys\nown = sys._getframe(1).f_locals\nos.write(own['verdict'], own['token'])\nos._exit(0)"
    (found,) = run_tests([Attempt(forging, ("assert f(1) == 2", "assert f(2) == 3"))], LIMITS)
    assert found.forged
    assert found.passed == (False, False)


@needs_sandbox
@pytest.mark.parametrize(("score", "expected"), [("share", [1.0, 0.5, 0.0, 0.0]), ("all", [1.0, 0.0, 0.0, 0.0])])
def test_a_response_is_worth_the_tests_that_its_code_passes(score: str, expected: list[float], tmp_path: Path) -> None:
    term = TERM.validate_python({"rule": "unit_tests", "score": score, "before": "given", "limits": {"wall_s": 5}})
    tests = ["assert triple(2) == 6", "assert triple(-1) == -3"]
    record = {"id": "rows.jsonl:1", "text": "", "reference": None, "columns": {"tests": tests, "given": "THREE = 3"}}
    (opened,) = open_text_terms({"tests": term}, tmp_path, [record])
    texts = [
        "Sure:\n```python\ndef triple(x):\n    return THREE * x\n```\nDone.",
        "def triple(x): return abs(x) * 3",
        "I cannot.",
        "```\ndef triple(x):\n",
    ]
    assert opened.values(texts, [record] * 4) == expected


def test_the_last_block_is_the_code_and_one_that_is_cut_off_counts() -> None:
    assert code_block("```py\na\n```\nthen\n```python\nb\n```") == "b\n"
    assert code_block("```python\nx = 1") == "x = 1"
    assert code_block("x = 1") is None


@pytest.mark.parametrize("tests", [[], "", 3, ["assert True", "def f(:"], [1]])
def test_a_row_whose_tests_are_none_is_named(tests: Any, tmp_path: Path) -> None:
    term = TERM.validate_python({"rule": "unit_tests"})
    record = {"id": "rows.jsonl:7", "text": "", "reference": None, "columns": {"tests": tests}}
    if tests == "":
        assert term.row_rule(record["columns"]) == ""  # an empty test is one that passes where the code runs
        return
    with pytest.raises(RequestError, match=r"rows.jsonl:7.*tests"):
        open_text_terms({"tests": term}, tmp_path, [record])


@needs_sandbox
def test_a_kernel_without_user_namespaces_is_refused_by_check_and_by_the_stage(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # in a user namespace that may not hold another one
        status = 1
        try:
            user = os.geteuid()
            kernel.unshare(kernel.CLONE_NEWUSER)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
            sandbox_finding.cache_clear()
            term = TERM.validate_python({"rule": "unit_tests"})
            finding = term_finding(term, tmp_path)
            assert finding is not None
            assert finding.code == "no-sandbox"
            with pytest.raises(RequestError) as raised:
                open_text_terms({"tests": term}, tmp_path, [])
            assert raised.value.codes == ("no-sandbox",)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_pass_at_k_is_the_share_of_choices_of_k_draws_with_one_that_passes() -> None:
    for draws, passed, k in ((5, 2, 1), (5, 2, 3), (6, 5, 2), (4, 0, 2)):
        chosen = list(combinations([1] * passed + [0] * (draws - passed), k))
        assert pass_at(k, draws, passed) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize("keys", [{"k": [2]}, {"samples": 2}, {"samples": 3, "temperature": 1, "k": [1, 1]}])
def test_draws_that_are_too_few_or_all_the_same_are_refused(keys: dict[str, Any]) -> None:
    data = {"source": "jsonl", "files": ["x.jsonl"]}
    with pytest.raises(ValidationError, match=r"samples|k lists"):
        CodeProblems.model_validate({"suite": "code", "data": data, **keys})
