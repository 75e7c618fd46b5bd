"""SIGKILL of the driver or of a worker at random moments of every kind of stage: resume, and the same bytes come out.

The short form interrupts one chain in its first stage, and kills once in each other one. The long form kills at five
seeded moments in every kind of stage, the driver and a worker in turn, each time in an empty store.
"""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.run.bed import Bed, Reference

pytestmark = pytest.mark.serial

STAGES = ("base", "chat", "judge", "policy", "eval")
LATEST = 0.9
"""Share of the reference's time within which moments are drawn; a later one may miss the stage."""
LATEST_IN_CHAIN = 0.5
"""The same where a missed stage cannot be tried again: these stages work for 2 s, and the journal is read late."""
NUM_MOMENTS = 5
TRIES = 4


def moment(seed: int, stage: str, reference: Reference, latest: float = LATEST) -> tuple[bool, float, int]:
    """When to kill: whether from the start of its work or of the stage, in seconds, and which of two ranks.

    Tiny stages spend most of their time on imports, so three moments of four are drawn from the work.
    """
    draw = random.Random(f"{seed}/{stage}")
    from_work = seed % 4 != 3
    seconds = (reference.work_seconds if from_work else reference.seconds)[stage]
    return from_work, draw.uniform(0.0, latest * seconds), draw.randrange(2)


def starts(bed: Bed, stage: str) -> int:
    """How often the journal says that the stage was started."""
    return sum(event["event"] == "stage_started" for event in bed.events(stage))


def signal_in_base(bed: Bed, chain: Path, number: int, code: int, state: str) -> None:
    """Run a chain, and send its driver a signal as soon as its first stage works: the run ends in order."""
    driver = bed.start("run", str(chain))
    bed.wait_for(lambda: bed.works("base"), driver)
    os.killpg(driver.pid, number)  # as a terminal, `timeout` and a batch system do
    assert driver.wait(60) == code, bed.output()
    bed.assert_nothing_left()
    assert bed.record().summary().state == state
    assert "trainwright resume" in bed.output()


def test_one_chain_with_an_interruption_and_a_kill_in_every_later_stage(
    make_bed: Callable[[], Bed], chain: Path, reference: Reference, say: Callable[[str], None]
) -> None:
    bed = make_bed()
    signal_in_base(bed, chain, signal.SIGINT, 130, "interrupted")
    driver = bed.start("resume", "last")
    hit_stages = {"base"}
    for number, stage in enumerate(STAGES[1:], start=1):
        victim = "driver" if number % 2 == 0 else "worker"
        from_work, after_s, rank = moment(number, stage, reference, LATEST_IN_CHAIN)
        hit = bed.kill(driver, stage, victim, from_work, after_s, rank)
        say(str(hit) if hit else f"{stage} was committed before the kill")
        if hit is None:
            continue
        hit_stages.add(stage)
        if victim == "driver":
            say(f"nothing left after {bed.assert_nothing_left():.1f} s")
            driver = bed.start("resume", "last")
    assert driver.wait(540) == 0, bed.output()
    bed.assert_nothing_left()
    assert bed.digests() == reference.digests
    assert {stage for stage in STAGES if starts(bed, stage) >= 2} >= hit_stages
    assert len(hit_stages) >= 4
    bed.finish("resume", "last")


@pytest.mark.long
@pytest.mark.parametrize("number", range(NUM_MOMENTS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_a_random_moment(
    make_bed: Callable[[], Bed],
    chain_up_to: Callable[[str], Path],
    reference: Reference,
    say: Callable[[str], None],
    stage: str,
    number: int,
) -> None:
    recipe = chain_up_to(stage)
    victim = ("driver", "worker")[number % 2]
    for seed in range(number, number + TRIES * NUM_MOMENTS, NUM_MOMENTS):
        bed = make_bed()
        driver = bed.start("run", str(recipe))
        from_work, after_s, rank = moment(seed, stage, reference)
        hit = bed.kill(driver, stage, victim, from_work, after_s, rank)
        if hit is not None:
            break
        assert driver.wait(540) == 0, bed.output()
    else:
        pytest.fail(f"{TRIES} moments lay after the end of {stage}")
    say(str(hit))
    if victim == "driver":
        say(f"nothing left after {bed.assert_nothing_left():.1f} s")
        bed.finish("resume", "last")
    else:
        assert driver.wait(540) == 0, bed.output()
        bed.finish("resume", "last")
    bed.assert_nothing_left()
    assert starts(bed, stage) == 2
    made = bed.digests()
    assert made == {name: reference.digests[name] for name in made}
    assert stage in made


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGTERM, 75, "stopped"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_to_the_driver_ends_the_run_in_order(
    make_bed: Callable[[], Bed],
    chain_up_to: Callable[[str], Path],
    reference: Reference,
    number: int,
    code: int,
    state: str,
) -> None:
    bed = make_bed()
    signal_in_base(bed, chain_up_to("base"), number, code, state)
    bed.finish("resume", "last")
    assert bed.digests() == {"base": reference.digests["base"]}
