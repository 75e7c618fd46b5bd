"""A rank is killed in each named phase of each kind of stage: the resume makes the same bytes of the same samples."""

from collections.abc import Callable
from typing import Any

import pytest

STAGES = ("base", "chat", "judge", "policy")
INTERVAL = {"base": 2, "chat": 2, "judge": 2, "policy": 4}
"""Steps between two saves."""
PHASES = (
    "data", "model", "train", "load batch", "forward", "backward", "all-reduce", "optimizer step", "evaluate", "save",
    "snapshot", "upload", "commit", "write",
)  # fmt: skip
SAMPLE = {
    "base": [("upload", 1), ("backward", 0)],
    "chat": [("snapshot", 0)],
    "judge": [("all-reduce", 1)],
    "policy": [("commit", 0), ("rollout", 1)],
}
"""What the default tier kills: a phase and a rank."""

RunJob = Callable[[list[dict[str, Any]]], dict[str, Any]]


@pytest.fixture(scope="module")
def run_job(make_stage_runner: Any, tmp_path_factory: pytest.TempPathFactory) -> RunJob:
    """Runs cases in one folder."""
    runner: RunJob = make_stage_runner(tmp_path_factory.mktemp("phases"))
    return runner


@pytest.fixture(scope="module")
def straight(run_job: RunJob) -> dict[str, Any]:
    """What an undisturbed run of every stage makes."""
    found = run_job([{"name": stage, "stage": stage, "run": "straight", "name_as": stage} for stage in STAGES])
    for stage in STAGES:
        assert "error" not in found[stage], found[stage]["error"]
    return found


def step_of(stage: str, phase: str) -> int:
    """The step in which a phase is met after at least one save; `write` and `data` have none."""
    if phase in ("data", "model", "write"):
        return 0
    if phase == "evaluate":
        return 3
    # The rollout that measures an iteration comes before the save of it.
    return {"policy": 6}.get(stage, 3) if phase != "rollout" else 8


def cases(wanted: list[tuple[str, str, int]], runs: str) -> list[dict[str, Any]]:
    """A run of its own for each kill; `runs` starts their names."""
    return [
        {
            "name": f"{stage}: {phase}, rank {rank}",
            "stage": stage,
            "run": f"{runs}-{stage}-{phase.replace(' ', '-')}-{rank}",
            "deaths": [{"rank": rank, "phase": phase, "step": step_of(stage, phase)}],
        }
        for stage, phase, rank in wanted
    ]


def check(straight: dict[str, Any], stage: str, found: dict[str, Any], phase: str) -> None:
    """The same bytes, the same numbers in every step that was done again, and none more than the interval."""
    assert "error" not in found, found["error"]
    wanted = straight[stage]
    assert found["digest"] == wanted["digest"]
    assert found["outcome"] == wanted["outcome"]
    assert found["values"].keys() == wanted["values"].keys()
    for step, lines in found["values"].items():
        assert all(line in wanted["values"][step] for line in lines), f"other metrics after step {step}"
    assert found["ids"].keys() == wanted["ids"].keys()
    for step, lines in found["ids"].items():
        assert all(line == wanted["ids"][step][0] for line in lines), f"other samples in step {step}"
    assert all(same == [True] * len(same) for same in found["restored"].values())
    died_at = step_of(stage, phase)
    if died_at:
        assert found["firsts"], "nothing was restored"
        assert died_at - found["firsts"][-1] <= INTERVAL[stage]


def test_a_rank_killed_in_a_phase_changes_nothing(
    run_job: RunJob, straight: dict[str, Any], say: Callable[[str], None]
) -> None:
    wanted = [(stage, phase, rank) for stage, kills in SAMPLE.items() for phase, rank in kills]
    found = run_job(cases(wanted, "some"))
    for stage, phase, rank in wanted:
        check(straight, stage, found[f"{stage}: {phase}, rank {rank}"], phase)
    say(f"{len(wanted)} kills of a rank in a named phase: same bytes, no step redone beyond the last save")


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_killed_in_every_phase_changes_nothing(
    run_job: RunJob, straight: dict[str, Any], say: Callable[[str], None], stage: str, rank: int
) -> None:
    phases = [phase for phase in PHASES if stage != "policy" or phase != "evaluate"]
    phases += ["rollout"] if stage == "policy" else []
    found = run_job(cases([(stage, phase, rank) for phase in phases], "every"))
    for phase in phases:
        check(straight, stage, found[f"{stage}: {phase}, rank {rank}"], phase)
    say(f"{stage}: rank {rank} killed in {', '.join(phases)}: same bytes, redone steps within the interval")


def resume_three_times(run_job: RunJob, straight: dict[str, Any], stages: tuple[str, ...], runs: str) -> None:
    """Each stage dies between its first two saves, between the next two, and when all is trained."""
    wanted = []
    for stage in stages:
        first, second = {"policy": (6, 10)}.get(stage, (3, 5))
        deaths = [{"rank": 0, "phase": "forward", "step": first}, {"rank": 1, "phase": "backward", "step": second}]
        deaths.append({"rank": 0, "phase": "write", "step": 0})
        wanted.append({"name": stage, "stage": stage, "run": f"{runs}-{stage}", "deaths": deaths})
    found = run_job(wanted)
    for stage in stages:
        check(straight, stage, found[stage], "write")
        interval = INTERVAL[stage]
        assert found[stage]["firsts"] == [interval, 2 * interval, 3 * interval]
        assert max(map(len, found[stage]["ids"].values())) == 2, "no step was done again"


def test_a_resume_of_a_resume_of_a_resume(run_job: RunJob, straight: dict[str, Any]) -> None:
    resume_three_times(run_job, straight, ("chat", "policy"), "thrice")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_resume_of_a_resume_of_a_resume_of_every_stage(run_job: RunJob, straight: dict[str, Any]) -> None:
    resume_three_times(run_job, straight, STAGES, "again")
