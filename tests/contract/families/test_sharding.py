"""How a family is sharded, and by how many workers it is trained, changes nothing that it learns."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import LIMIT, UNDER_ZERO_3, difference, result
from family_stages import KIT

sys.path.pop(0)


def compare(folder: Path, family: str, run: str) -> None:
    """Hold the curves of a run against those of the plain engine on one worker."""
    wanted, found = result(folder, "plain", family), result(folder, run, family)
    assert len(set(wanted["curves"]["loss"].values())) == 6
    for curve in ("loss", "eval/loss"):
        assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT, run


@pytest.mark.parametrize("family", KIT)
def test_two_workers_give_the_plain_curve(finished: Path, family: str) -> None:
    compare(finished, family, "straight")


@pytest.mark.parametrize("family", [family for family in UNDER_ZERO_3 if family in KIT])
def test_zero_3_gives_the_plain_curve(finished: Path, family: str) -> None:
    compare(finished, family, "zero3")


@pytest.mark.long
@pytest.mark.parametrize("family", KIT)
def test_every_zero_stage_gives_the_plain_curve(every_stage: Path, family: str) -> None:
    for zero in (0, 2, 3):
        compare(every_stage, family, f"zero{zero}")


@pytest.mark.long
def test_a_gan_s_two_engines_equal_the_plain_one_over_twenty_steps(every_stage: Path) -> None:
    wanted, found = result(every_stage, "twenty-plain", "gan"), result(every_stage, "twenty", "gan")
    assert wanted["steps"] == list(range(1, 21))
    for curve in ("loss", "generator_loss"):
        assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT
