"""The state of a run, and the summary that its driver writes last, which saves reading the journal.

`journal/<driver>.json` also records where the journal of each driver ended. A later event or another driver makes it
stale; then, and where there is no such file, the journal itself is read.
"""

import logging
import re
from dataclasses import asdict
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from launch.records.journal import FINISHED, RunSummary, summarise
from trainers.store.manifest import canonical_json
from trainers.store.runs import Run, segment_name

log = logging.getLogger("trainwright.run")

JOURNAL = "journal"
FORMAT = 1
_SUFFIX = ".json"
_PART = re.compile(rf"/{JOURNAL}/([^/]+)/(\d+)\.jsonl")


@dataclass(frozen=True)
class History:
    """What a run's journal comes to."""

    summary: RunSummary
    committed: dict[str, bool]
    """Fingerprint of each stage that was committed or found cached -> whether this run computed it."""


@dataclass(frozen=True)
class End(History):
    """What a driver writes last."""

    format: int
    ends: dict[str, int]
    """The number of the last segment of each driver's journal."""


def read_history(folder: Run, run: str, recipe: dict[str, Any]) -> History:
    """Read a whole journal; `recipe` is the content of `recipe.json`."""
    return _fold(folder, folder.segments(JOURNAL), run, recipe)


def write_end(folder: Run, driver: str, run: str, recipe: dict[str, Any]) -> None:
    """Write how a run has ended; nothing where it has not, for a driver of it still runs, or was killed."""
    segments = folder.segments(JOURNAL)
    history = _fold(folder, segments, run, recipe)
    if history.summary.state not in FINISHED:
        return
    ends: dict[str, int] = {}
    for path in segments:
        match = _PART.search(path)
        if match:
            ends[match.group(1)] = max(int(match.group(2)), ends.get(match.group(1), 0))
    record = {"format": FORMAT, "ends": ends, "summary": asdict(history.summary), "committed": history.committed}
    folder.write_once(f"{JOURNAL}/{driver}{_SUFFIX}", canonical_json(record))


def find_end(folder: Run) -> History | None:
    """Return what the last driver wrote last; None: there is none, or it is stale."""
    names = folder.names(JOURNAL)
    drivers = [name for name in names if not name.endswith(_SUFFIX)]
    if not drivers or f"{drivers[-1]}{_SUFFIX}" not in names:
        return None
    name = f"{JOURNAL}/{drivers[-1]}{_SUFFIX}"
    data = folder.find(name)
    try:
        end = None if data is None else _reader().validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        log.warning("%s: %s is not used, the journal is read instead: %s", folder, name, problem["msg"])
        return None
    if end is None or end.format != FORMAT or end.ends.keys() != set(drivers) or end.summary.state not in FINISHED:
        return None
    later = [f"{JOURNAL}/{driver}/{segment_name(last + 1)}" for driver, last in end.ends.items()]
    return None if any(folder.find_all(later)) else end


@cache
def _reader() -> TypeAdapter[End]:
    return TypeAdapter(End)


def _fold(folder: Run, segments: list[str], run: str, recipe: dict[str, Any]) -> History:
    events = sorted(folder.lines(segments), key=lambda event: float(event["at"]))
    stages = [(entry["name"], entry["kind"]) for entry in recipe["plan"]]
    committed: dict[str, bool] = {}
    for event in events:
        if event["event"] == "stage_committed":
            fingerprint = str(event["fingerprint"])
            committed[fingerprint] = committed.get(fingerprint, False) or not event["cached"]
    return History(summarise(run, recipe["recipe"]["name"], stages, events), committed)
