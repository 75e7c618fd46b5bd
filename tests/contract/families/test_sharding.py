"""How a family is sharded, and by how many workers it is trained, changes nothing that it learns."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import LIMIT, difference, result
from family_stages import KIT

sys.path.pop(0)


@pytest.mark.parametrize("family", KIT)
@pytest.mark.parametrize("run", ["zero3", "plain"])
def test_sharding_and_workers_do_not_change_the_curve(finished: Path, family: str, run: str) -> None:
    wanted, found = result(finished, "straight", family), result(finished, run, family)
    assert len(set(wanted["curves"]["loss"].values())) == 6
    for curve in ("loss", "eval/loss"):
        assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT


def test_a_gan_s_two_engines_equal_the_plain_one_over_twenty_steps(finished: Path) -> None:
    wanted, found = result(finished, "twenty-plain", "gan"), result(finished, "twenty", "gan")
    assert wanted["steps"] == list(range(1, 21))
    for curve in ("loss", "generator_loss"):
        assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT


@pytest.mark.long
@pytest.mark.parametrize("family", KIT)
def test_every_zero_stage_gives_the_plain_curve(every_stage: Path, family: str) -> None:
    wanted = result(every_stage, "plain", family)
    for zero in (0, 2, 3):
        found = result(every_stage, f"zero{zero}", family)
        for curve in ("loss", "eval/loss"):
            assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT, zero
