"""A rank is killed in each named phase of each kind of stage: the resume makes the same bytes of the same samples."""

from collections.abc import Callable

import pytest

from tests.small_chain import Case, Death, Outcome, SmallChain

STAGES = ("base", "chat", "judge", "policy")
INTERVAL = {"base": 2, "chat": 2, "judge": 2, "policy": 4}
"""Steps between two saves."""
PHASES = (
    "data", "model", "train", "load batch", "forward", "backward", "all-reduce", "optimizer step", "evaluate", "save",
    "snapshot", "upload", "commit", "write",
)  # fmt: skip
SAMPLE = {"base": ("upload", 1), "policy": ("rollout", 0)}
"""What the default tier kills: a phase of a save and of an iteration; below, in `chat`, phases of a step. A judge is
killed in `test_adapters_on_adapters.py`."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> SmallChain:
    """A folder for all cases."""
    return SmallChain(tmp_path_factory.mktemp("phases"))


@pytest.fixture(scope="module")
def straight(chain: SmallChain) -> dict[str, Outcome]:
    """What an undisturbed run of every stage makes."""
    return chain.run([Case(stage, stage, "straight", name_as=stage) for stage in STAGES])


def step_of(stage: str, phase: str) -> int:
    """The step in which a phase is met after at least one save; `write` and `data` have none."""
    if phase in ("data", "model", "write"):
        return 0
    if phase == "evaluate":
        return 3
    # The rollout that measures an iteration comes before the save of it.
    return {"policy": 6}.get(stage, 3) if phase != "rollout" else 8


def cases(wanted: list[tuple[str, str, int]], runs: str) -> list[Case]:
    """A run of its own for each kill; `runs` starts their names."""
    return [
        Case(
            f"{stage}: {phase}, rank {rank}",
            stage,
            f"{runs}-{stage}-{phase.replace(' ', '-')}-{rank}",
            deaths=[Death(rank, phase, step_of(stage, phase))],
        )
        for stage, phase, rank in wanted
    ]


def check(straight: dict[str, Outcome], stage: str, found: Outcome, phase: str) -> None:
    """The same bytes, the same numbers in every step that was done again, and none more than the interval."""
    wanted = straight[stage]
    assert found.result.digest == wanted.result.digest
    assert found.result.outcome == wanted.result.outcome
    assert found.values.keys() == wanted.values.keys()
    for step, lines in found.values.items():
        assert all(line in wanted.values[step] for line in lines), f"other metrics after step {step}"
    assert found.ids.keys() == wanted.ids.keys()
    for step, lines in found.ids.items():
        assert all(line == wanted.ids[step][0] for line in lines), f"other samples in step {step}"
    assert all(same == [True] * len(same) for same in found.restored.values())
    died_at = step_of(stage, phase)
    if died_at:
        assert found.firsts, "nothing was restored"
        assert died_at - found.firsts[-1] <= INTERVAL[stage]


def test_a_rank_killed_in_a_phase_changes_nothing(
    chain: SmallChain, straight: dict[str, Outcome], say: Callable[[str], None]
) -> None:
    wanted = [(stage, phase, rank) for stage, (phase, rank) in SAMPLE.items()]
    found = chain.run(cases(wanted, "some"))
    for stage, phase, rank in wanted:
        check(straight, stage, found[f"{stage}: {phase}, rank {rank}"], phase)
    say(f"{len(wanted)} kills of a rank in a named phase: same bytes, no step redone beyond the last save")


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_killed_in_every_phase_changes_nothing(
    chain: SmallChain, straight: dict[str, Outcome], say: Callable[[str], None], stage: str, rank: int
) -> None:
    phases = [phase for phase in PHASES if stage != "policy" or phase != "evaluate"]
    phases += ["rollout"] if stage == "policy" else []
    found = chain.run(cases([(stage, phase, rank) for phase in phases], "every"))
    for phase in phases:
        check(straight, stage, found[f"{stage}: {phase}, rank {rank}"], phase)
    say(f"{stage}: rank {rank} killed in {', '.join(phases)}: same bytes, redone steps within the interval")


def resume_three_times(chain: SmallChain, straight: dict[str, Outcome], stages: tuple[str, ...], runs: str) -> None:
    """Each stage dies between its first two saves, between the next two, and when all is trained."""
    wanted = []
    for stage in stages:
        first, second = {"policy": (6, 10)}.get(stage, (3, 5))
        deaths = [Death(0, "forward", first), Death(1, "backward", second), Death(0, "write", 0)]
        wanted.append(Case(stage, stage, f"{runs}-{stage}", deaths=deaths))
    found = chain.run(wanted)
    for stage in stages:
        check(straight, stage, found[stage], "write")
        interval = INTERVAL[stage]
        assert found[stage].firsts == [interval, 2 * interval, 3 * interval]
        assert max(map(len, found[stage].ids.values())) == 2, "no step was done again"


def test_a_resume_of_a_resume_of_a_resume(chain: SmallChain, straight: dict[str, Outcome]) -> None:
    resume_three_times(chain, straight, ("chat",), "thrice")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_resume_of_a_resume_of_a_resume_of_every_stage(chain: SmallChain, straight: dict[str, Outcome]) -> None:
    resume_three_times(chain, straight, STAGES, "again")
