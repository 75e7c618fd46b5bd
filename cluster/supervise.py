"""Failure policy, pure: what ended a rank, which end came first, whether to try again, who holds up a stalled group."""

import errno
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.protocol import Json, Verdict, VerdictKind
from cluster.silence import STEPPING

UNLIMITED_S = float("inf")

# What the others of a group raise when one of them dies: never the first cause if any other is known.
_CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (closed|timeout)|remote process exited"
    r"|nccl\w*error|nccl error|distbackenderror|distnetworkerror|diststoreerror"
    r"|timed out waiting|wait timeout|timeout.*(gloo|barrier)"
    r"|gloo.*(timed out|timeout)|failed to (send|recv)",
    re.IGNORECASE,
)
_COLLECTIVE = re.compile(
    r"\b(all_?reduce|all_?gather\w*|reduce_?scatter\w*|barrier|broadcast\w*|all_?to_?all\w*|synchronize)\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How one rank's process ended, as its node saw it."""

    rank: int
    node: str
    at: float
    """Wall-clock seconds since the epoch, taken where it happened."""
    kind: VerdictKind | Literal["result"]
    message: str = ""
    infrastructure: bool = False
    error: str | None = None
    exit_code: int = 4
    traceback: str = ""
    tail: tuple[str, ...] = ()
    result: Json | None = None
    phase: str = ""
    progress: Json = field(default_factory=dict)

    @property
    def is_consequence(self) -> bool:
        """Whether this end is of the sort that another rank's end brings about."""
        return self.kind == "exception" and bool(_CONSEQUENCE.search(f"{self.error}: {self.message}"))


def classify(
    rank: int,
    node: str,
    at: float,
    *,
    error: Mapping[str, Any] | None = None,
    returncode: int | None = None,
    oom_kills: int = 0,
    rss_bytes: int = 0,
    last_phase: str = "",
    tail: Sequence[str] = (),
) -> RankEnd:
    """The end of a rank, from what it reported before it left (`error`) or from how the kernel says it left."""
    where = f"rank {rank} on node {node}"
    during = f" during {last_phase}" if last_phase else ""
    if error is not None:
        return _raised(rank, node, float(error.get("at", at)), error, where, during, tuple(tail))
    code = 0 if returncode is None else returncode
    if code >= 0:
        message = f"exit status {code} without a result: {where}{during}"
        return RankEnd(rank=rank, node=node, at=at, kind="exit", message=message, tail=tuple(tail))
    name = _signal_name(-code)
    if -code == signal.SIGKILL and oom_kills:
        size = f"{rss_bytes / 2**30:.1f} GiB resident"
        message = f"killed for memory (signal 9, {oom_kills} OOM kill in its cgroup, {size}): {where}{during}"
        return RankEnd(
            rank=rank, node=node, at=at, kind="out_of_memory", message=message, infrastructure=True, tail=tuple(tail)
        )
    # A crash in native code comes back with the same input; a kill from outside does not.
    outside = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    message = f"signal {-code} ({name}): {where}{during}"
    return RankEnd(
        rank=rank, node=node, at=at, kind="signal", message=message, infrastructure=outside, tail=tuple(tail)
    )


def _raised(
    rank: int, node: str, at: float, error: Mapping[str, Any], where: str, during: str, tail: tuple[str, ...]
) -> RankEnd:
    name, text = str(error["error"]), str(error["message"])
    exit_code = int(error.get("exit_code", 4))
    first_line = text.splitlines()[0] if text else ""
    kind: VerdictKind = "exception"
    infrastructure = False
    if exit_code == 75:
        kind = "preempted"
    elif error.get("errno") in (errno.ENOSPC, errno.EDQUOT):
        kind = "disk_full"
    elif error.get("errno") == errno.EADDRINUSE or "EADDRINUSE" in text:
        infrastructure = True
    end = RankEnd(
        rank=rank,
        node=node,
        at=at,
        kind=kind,
        message=f"{name}: {first_line} ({where}{during})",
        infrastructure=infrastructure,
        error=name,
        exit_code=exit_code,
        traceback=str(error.get("traceback", "")),
        tail=tail,
    )
    return end


def judge(ends: Sequence[RankEnd]) -> Verdict:
    """The one cause among the ends of a group: the earliest that no other end brought about."""
    failed = sorted((end for end in ends if end.kind != "result"), key=lambda end: (end.at, end.rank))
    assert failed, "no rank failed"
    causes = [end for end in failed if not end.is_consequence and end.kind not in ("preempted", "stopped")]
    asked = [end for end in failed if end.kind == "preempted"] or [end for end in failed if end.kind == "stopped"]
    first = (causes or asked or failed)[0]
    return Verdict(
        kind=first.kind if first.kind != "result" else "exit",
        message=first.message,
        rank=first.rank,
        node=first.node,
        # A broken connection without any other cause is the network's, or a lost node's.
        infrastructure=first.infrastructure or first.is_consequence,
        error=first.error,
        exit_code=first.exit_code,
        traceback=first.traceback,
        tail=first.tail,
        folded=tuple(end.message for end in failed if end is not first),
    )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One failed try at a stage, and the last step whose state was committed by its end."""

    verdict: Verdict
    step: int


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after a pause."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Fail:
    """Give up, and say why."""

    reason: str


def decide(attempts: Sequence[Attempt], max_retries: int) -> Retry | Fail:
    """What to do after the last of these attempts at one stage failed."""
    verdict = attempts[-1].verdict
    if verdict.kind in ("preempted", "stopped"):
        return Fail("stopped on request")
    if not verdict.infrastructure:
        return Fail("it would fail in the same way")
    if len(attempts) > max_retries:
        return Fail(f"{len(attempts)} attempts, {max_retries} retries allowed")
    if len(attempts) >= 3 and len({attempt.step for attempt in attempts[-3:]}) == 1:
        return Fail(f"no progress past step {attempts[-1].step} in 3 attempts")
    memory = [attempt for attempt in attempts if attempt.verdict.kind == "out_of_memory"]
    if len(memory) >= 2 and memory[-1].step == memory[-2].step:
        return Fail("out of memory twice at one step")
    # The first retry is free: the imports stand ready and most kills do not come in pairs.
    return Retry(0.0 if len(attempts) == 1 else min(60.0, 2.0 ** (len(attempts) - 1)))


@dataclass(frozen=True, slots=True)
class Pulse:
    """Where a rank is and how long it has been silent."""

    phase: str
    silent_s: float
    progress: Mapping[str, Any] = field(default_factory=dict)
    stopped_s: float = 0.0
    """For how long its process has been stopped by a signal."""


def find_stall(
    pulses: Mapping[int, Pulse],
    limits_s: Mapping[str, float],
    stopped_limit_s: float = UNLIMITED_S,
    pace_limit_s: float = UNLIMITED_S,
) -> list[int]:
    """Ranks silent for longer than their phase allows (unlimited unless the limits name it or `"*"`), or stopped for
    longer than `stopped_limit_s`; all ranks when all of them train and are silent beyond `pace_limit_s`.

    Where one waits for the store, neither it has stalled nor those that wait for it.
    """
    late = [
        rank
        for rank, pulse in sorted(pulses.items())
        if pulse.silent_s > limits_s.get(pulse.phase, limits_s.get("*", UNLIMITED_S))
        or pulse.stopped_s > stopped_limit_s
    ]
    if late or not all(pulse.phase == STEPPING and pulse.silent_s > pace_limit_s for pulse in pulses.values()):
        return late
    return sorted(pulses)


def odd_rank(pulses: Mapping[int, Pulse], stacks: Mapping[int, str]) -> int:
    """Whom the others wait for: stopped, alone in its place, outside a collective, behind, or silent the longest."""
    stopped = {rank: pulse.stopped_s for rank, pulse in pulses.items() if pulse.stopped_s}
    if stopped:
        return max(stopped, key=lambda rank: (stopped[rank], -rank))
    places = {rank: (pulse.phase, pulse.progress.get("step")) for rank, pulse in pulses.items()}
    crowd = Counter(places.values())
    fewest = min(crowd.values())
    alone = [rank for rank, place in places.items() if crowd[place] == fewest]
    if fewest == max(crowd.values()):
        alone = list(places)
    outside = [rank for rank in alone if stacks.get(rank) and not _COLLECTIVE.search(stacks[rank])]
    candidates = outside if outside and len(outside) < len(pulses) else alone

    def behind(rank: int) -> tuple[float, float, int]:
        step = pulses[rank].progress.get("step")
        return (step if isinstance(step, int | float) else float("inf"), -pulses[rank].silent_s, rank)

    return min(candidates, key=behind)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
