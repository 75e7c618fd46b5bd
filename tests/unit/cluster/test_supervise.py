"""Failure policy: causes, their order, retries, stalls."""

import errno
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.protocol import Verdict, VerdictKind
from cluster.supervise import Attempt, Fail, Pulse, RankEnd, Retry, classify, decide, find_stall, judge, odd_rank


def raised(rank: int, at: float, error: str, message: str, **more: Any) -> RankEnd:
    """The end of a rank by an exception."""
    return classify(rank, "10.0.0.1", 99.0, error={"error": error, "message": message, "at": at, **more})


BROKEN = ("RuntimeError", "[gloo/transport/tcp/pair.cc:525] Connection closed by peer [10.0.0.2]:4242")


def test_the_earliest_own_failure_is_the_cause() -> None:
    """A broken connection is folded even if it was seen first."""
    cause = raised(1, 5.0, "ValueError", "bad row 17\nand more", traceback="Traceback of rank 1")
    verdict = judge([raised(0, 4.9, *BROKEN), cause, raised(2, 5.2, "KeyError", "later")])
    assert (verdict.kind, verdict.rank, verdict.error, verdict.infrastructure) == ("exception", 1, "ValueError", False)
    assert verdict.message == "ValueError: bad row 17 (rank 1 on node 10.0.0.1)"
    assert verdict.traceback == "Traceback of rank 1"
    assert len(verdict.folded) == 2


def test_a_kill_behind_broken_connections_is_the_cause() -> None:
    """The kernel's word counts more than what the peers saw of it."""
    killed = classify(2, "n", 7.0, returncode=-signal.SIGKILL, last_phase="train")
    verdict = judge([raised(0, 6.9, *BROKEN), raised(1, 6.95, "DistBackendError", "NCCL error"), killed])
    assert (verdict.kind, verdict.rank, verdict.infrastructure) == ("signal", 2, True)
    assert verdict.message == "signal 9 (SIGKILL): rank 2 on node n during train"


def test_broken_connections_alone_are_the_network() -> None:
    """Nobody else failed: another attempt may succeed."""
    verdict = judge([raised(1, 2.0, *BROKEN), raised(0, 1.0, *BROKEN)])
    assert (verdict.rank, verdict.infrastructure) == (0, True)


def test_preempted_ranks_are_a_preemption_unless_one_failed() -> None:
    """Saved state counts; a real failure beside it counts more."""
    saved = [raised(rank, 3.0, "Preempted", "saved at step 4", exit_code=75) for rank in (0, 1)]
    assert judge(saved).kind == "preempted"
    assert judge(saved).exit_code == 75
    assert judge([*saved, raised(2, 9.0, "ValueError", "no")]).kind == "exception"


@pytest.mark.parametrize(
    ("end", "kind", "infrastructure", "text"),
    [
        (classify(0, "n", 0, returncode=-9), "signal", True, "signal 9 (SIGKILL): rank 0 on node n"),
        (classify(0, "n", 0, returncode=-15), "signal", True, "signal 15 (SIGTERM)"),
        (classify(0, "n", 0, returncode=-11), "signal", False, "signal 11 (SIGSEGV)"),
        (classify(0, "n", 0, returncode=-6), "signal", False, "signal 6 (SIGABRT)"),
        (
            classify(0, "n", 0, returncode=-9, oom_kills=1, rss_bytes=3 * 2**30),
            "out_of_memory",
            True,
            "killed for memory (signal 9, 1 OOM kill in its cgroup, 3.0 GiB resident): rank 0 on node n",
        ),
        (classify(0, "n", 0, returncode=-11, oom_kills=1), "signal", False, "signal 11 (SIGSEGV)"),
        (classify(0, "n", 0, returncode=3), "exit", False, "exit status 3 without a result: rank 0 on node n"),
        (raised(0, 0, "OSError", "No space left", errno=errno.ENOSPC), "disk_full", False, "OSError: No space left"),
        (raised(0, 0, "OSError", "in use", errno=errno.EADDRINUSE), "exception", True, "OSError: in use"),
        (raised(0, 0, "CapacityError", "too little disk", exit_code=3), "exception", False, "too little disk"),
    ],
)
def test_every_death_has_its_kind(end: RankEnd, kind: str, infrastructure: bool, text: str) -> None:
    """Kind, whether to retry, one line."""
    assert (end.kind, end.infrastructure) == (kind, infrastructure)
    assert text in end.message


def test_exit_code_of_the_error_is_the_verdicts() -> None:
    """The command line ends with it."""
    assert judge([raised(0, 0, "StoreDamaged", "bad", exit_code=5)]).exit_code == 5
    assert judge([raised(0, 0, "ValueError", "bad")]).exit_code == 4


ENDS = st.lists(
    st.one_of(
        st.builds(lambda at: raised(0, at, *BROKEN), st.floats(0, 10)),
        st.builds(lambda at: raised(1, at, "ValueError", "own"), st.floats(0, 10)),
        st.builds(lambda at: classify(2, "n", at, returncode=-9), st.floats(0, 10)),
        st.builds(lambda at: raised(3, at, "Preempted", "saved", exit_code=75), st.floats(0, 10)),
    ),
    min_size=1,
    max_size=8,
)


@given(ENDS, st.randoms(use_true_random=False))
def test_the_cause_does_not_depend_on_the_order_of_arrival(ends: list[RankEnd], random: Any) -> None:
    """Shuffled, the same verdict; and it is never a consequence while there is a cause."""
    shuffled = list(ends)
    random.shuffle(shuffled)
    first, second = judge(ends), judge(shuffled)
    assert (first.kind, first.rank, first.message) == (second.kind, second.rank, second.message)
    own = [end.at for end in ends if end.error == "ValueError" or end.kind == "signal"]
    if own:
        assert first.kind == "signal" or first.error == "ValueError"
    assert len(first.folded) == len(ends) - 1


def failed(kind: VerdictKind = "signal", step: int = 0, infrastructure: bool = True) -> Attempt:
    """An attempt that ended so."""
    return Attempt(Verdict(kind=kind, message="m", infrastructure=infrastructure), step)


@pytest.mark.parametrize(
    ("attempts", "decision"),
    [
        ([failed()], Retry(0.0)),
        ([failed(step=1), failed(step=2)], Retry(2.0)),
        ([failed(step=1), failed(step=2), failed(step=3)], Retry(4.0)),
        ([failed(infrastructure=False)], Fail("it would fail in the same way")),
        ([failed(kind="preempted")], Fail("stopped on request")),
        ([failed(step=5)] * 3, Fail("no progress past step 5 in 3 attempts")),
        ([failed(step=1), failed(step=1), failed(step=2)], Retry(4.0)),
        ([failed("out_of_memory", 4)] * 2, Fail("out of memory twice at one step")),
        ([failed("out_of_memory", 4), failed("out_of_memory", 9)], Retry(2.0)),
        ([failed(step=n) for n in range(11)], Fail("11 attempts, 10 retries allowed")),
    ],
)
def test_decisions(attempts: list[Attempt], decision: Retry | Fail) -> None:
    """Infrastructure is retried with back-off while there is progress."""
    assert decide(attempts, max_retries=10) == decision


def test_no_retries_allowed() -> None:
    """The recipe's word is final."""
    assert decide([failed()], max_retries=0) == Fail("1 attempts, 0 retries allowed")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 100))
def test_retries_end(steps: list[int], max_retries: int) -> None:
    """Never more retries than allowed, never a pause beyond a minute."""
    decision = decide([failed(step=step) for step in steps], max_retries)
    if isinstance(decision, Retry):
        assert len(steps) <= max_retries
        assert 0 <= decision.delay_s <= 60


def test_stall_limits_are_by_phase() -> None:
    """A phase's own limit, else the one for all others, else none."""
    pulses = {0: Pulse("train", 11), 1: Pulse("load", 100), 2: Pulse("evaluate", 3000)}
    assert find_stall(pulses, {"train": 10, "*": 1000}) == [0, 2]
    assert find_stall(pulses, {"train": 10}) == [0]
    assert find_stall(pulses, {}) == []


def test_training_is_stalled_when_all_ranks_are_silent_beyond_its_pace_and_a_stopped_rank_by_itself() -> None:
    """One that waits for the store holds up the others, and is no stall."""
    waits = {0: Pulse("wait for the store", 100), 1: Pulse("train", 100)}
    assert find_stall(waits, {"*": 1800}, 30, 40) == []
    trains = {0: Pulse("train", 100), 1: Pulse("train", 41)}
    assert find_stall(trains, {"*": 1800}, 30, 40) == [0, 1]
    assert find_stall(trains, {"*": 1800}, 30, 42) == []
    stopped = {0: Pulse("data", 100), 1: Pulse("data", 31, stopped_s=31)}
    assert find_stall(stopped, {"*": 1800}, 30, 40) == [1]
    assert odd_rank({0: Pulse("train", 100), 1: Pulse("train", 99, stopped_s=5)}, {1: WAITING}) == 1


WAITING = 'File "x.py", line 3 in all_reduce'
SLEEPING = 'File "x.py", line 9 in read_rows'


@pytest.mark.parametrize(
    ("pulses", "stacks", "odd"),
    [
        ({0: Pulse("train", 9, {"step": 4}), 1: Pulse("train", 8, {"step": 3})}, {}, 1),
        ({0: Pulse("save", 9), 1: Pulse("train", 8), 2: Pulse("save", 7)}, {}, 1),
        (
            {rank: Pulse("train", 9, {"step": 4}) for rank in range(3)},
            {0: WAITING, 1: WAITING, 2: SLEEPING},
            2,
        ),
        ({0: Pulse("train", 5, {"step": 4}), 1: Pulse("train", 9, {"step": 4})}, {}, 1),
    ],
)
def test_the_odd_rank_is_named(pulses: dict[int, Pulse], stacks: dict[int, str], odd: int) -> None:
    """Alone in its place, or outside the collective, or the longest silent."""
    assert odd_rank(pulses, stacks) == odd
