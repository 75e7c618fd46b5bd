"""No test falls between the tiers of the Makefile."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_what_runs_alone_lies_where_it_is_looked_for() -> None:
    (folders,) = re.findall(r"^ALONE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    places = tuple(f"{folder}/" for folder in folders.split())
    alone = [
        str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if "mark.serial" in path.read_text()
    ]
    elsewhere = [name for name in alone if not name.startswith(places) and name != "tests/unit/test_tiers.py"]
    assert [name for name in alone if name.startswith("tests/e2e/")]
    for name in elsewhere:  # the long tier looks everywhere
        text = (ROOT / name).read_text()
        assert len(re.findall(r"mark\.serial", text)) <= len(re.findall(r"mark\.long", text)), name
