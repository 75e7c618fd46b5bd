"""A run on Ray is stopped and resumed with changed settings: each is refused until it is allowed, and recorded."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.run.bed import Bed
from trainers.store.store import Store

STEPS, RATE = "stages.base.train.steps", "stages.base.train.optimizer.lr"
CHANGED = ("--set", f"{STEPS}=26", "--set", f"{RATE}=0.002")


def answer(bed: Bed, *arguments: str) -> tuple[int, str]:
    """Exit code and output of one command."""
    before = len(bed.output())
    code = bed.start(*arguments).wait(300)
    return code, bed.output()[before:]


@pytest.mark.long
@pytest.mark.serial
def test_changed_settings_are_refused_one_by_one_and_recorded(
    make_bed: Callable[[], Bed], chain_up_to: Callable[[str], Path]
) -> None:
    bed = make_bed()
    driver = bed.start("run", str(chain_up_to("base")))
    bed.wait_for(lambda: bed.works("base"), driver)
    os.killpg(driver.pid, signal.SIGTERM)
    assert driver.wait(120) == 75, bed.output()

    code, text = answer(bed, "resume", "last", *CHANGED)
    assert code == 2
    assert f"{STEPS}: 24, then 26" in text or (STEPS in text and "24" in text and "26" in text)
    assert RATE in text
    code, text = answer(bed, "resume", "last", *CHANGED, "--allow-change", STEPS)
    assert code == 2
    assert RATE in text
    assert f"  {STEPS}" not in text, "what is allowed is not listed"
    code, text = answer(
        bed, "resume", "last", *CHANGED, *("--allow-change", STEPS, "--allow-change", "stages.base.seed")
    )
    assert code == 2
    for field in ("--set", "stages.base.architecture.hidden_size=64"), ("--set", "seed=4"):
        code, text = answer(bed, "resume", "last", *field)
        assert code == 2
        assert field[1].partition("=")[0] in text

    code, text = answer(bed, "resume", "last", *CHANGED, "--allow-change", STEPS, "--allow-change", RATE)
    assert code == 0, text
    (made,) = Store.open(str(bed.store)).list_artifacts()
    assert made.outcome.steps_done == made.outcome.steps_planned == 26
    assert {(change["field"], change["before"], change["after"]) for change in made.changes} == {
        (STEPS, 24, 26),
        (RATE, 0.001, 0.002),
    }
    assert made.exactness is not None
    assert made.exactness.startswith("continuing")
    bed.assert_nothing_left()
