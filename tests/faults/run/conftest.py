"""Runs in processes of their own that are killed from outside, and what is left of them afterwards."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.faults.run.bed import BEFORE_WORK, CHAIN, Bed, Reference


@pytest.fixture
def make_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Bed]]:
    """Empty stores; Ray's sockets need the short temporary folder."""
    beds: list[Bed] = []

    def make() -> Bed:
        bed = Bed(tmp_path_factory.mktemp("bed") / "store", Path(tempfile.mkdtemp(prefix="t", dir="/tmp")))
        beds.append(bed)
        return bed

    yield make
    for bed in beds:
        bed.close()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One undisturbed run of the chain for all tests."""
    bed = Bed(tmp_path_factory.mktemp("reference") / "store", Path(tempfile.mkdtemp(prefix="t", dir="/tmp")))
    try:
        bed.finish("run", str(CHAIN))
        bed.assert_nothing_left()
        seconds = {e["stage"]: e["seconds"] for e in bed.events() if e["event"] == "stage_committed"}
        work: dict[str, float] = {}
        for event in bed.events():
            if event["event"] == "phase" and event["phase"] not in BEFORE_WORK:
                work.setdefault(event["stage"], event["at"])
            elif event["event"] == "stage_committed":
                work[event["stage"]] = event["at"] - work.get(event["stage"], event["at"])
        return Reference(bed.digests(), seconds, work)
    finally:
        bed.close()


@pytest.fixture
def chain() -> Path:
    """The recipe of the tests here."""
    return CHAIN


@pytest.fixture
def chain_up_to(tmp_path: Path) -> Callable[[str], Path]:
    """Makes the chain without the stages that do not lead to the named one."""

    def make(stage: str) -> Path:
        whole = yaml.safe_load(CHAIN.read_text())
        needed: list[str] = [stage]
        for name in needed:
            spec = whole["stages"][name]
            judges = [term["model"] for term in spec.get("rewards", {}).values() if "model" in term]
            wanted = [spec.get("init_from"), spec.get("actor"), *judges, *spec.get("of", [])]
            needed += [other for other in wanted if other is not None and other not in needed]
        whole["stages"] = {name: spec for name, spec in whole["stages"].items() if name in needed}
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False))
        return path

    return make
