"""The disk of the store fills while a run on Ray is under way, and is cleared again: the run waits, and goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.run.bed import Bed, Reference


@pytest.mark.long
@pytest.mark.serial
def test_a_run_waits_for_room_and_goes_on(
    make_bed: Callable[[], Bed], chain_up_to: Callable[[str], Path], mount: Callable[..., Path], reference: Reference
) -> None:
    bed = make_bed()
    disk = mount("-t", "tmpfs", "-o", "size=100m,mode=755", "tmpfs", name="small")
    bed.store.symlink_to(disk)
    driver = bed.start("run", str(chain_up_to("base")))
    bed.wait_for(lambda: bed.works("base"), driver)
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 12))
            except OSError:
                break
    bed.wait_for(lambda: "waiting for room" in bed.output(), driver)
    ballast.unlink()
    assert driver.wait(300) == 0, bed.output()
    assert "room again" in bed.output()
    assert bed.digests() == {"base": reference.digests["base"]}
    bed.assert_nothing_left()
