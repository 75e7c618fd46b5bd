"""A run's folder in the store: what it holds, who drives it, its state."""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.inputs.resolved import Resolved
from launch.records.histories import JOURNAL, History, find_end, read_history, write_end
from launch.records.journal import Journal, RunSummary
from recipes.errors import RequestError
from trainers.store.background_threads import map_requests
from trainers.store.store import Store

RECIPE = "recipe.json"
STOPS = "stops"
REPORT = "report.html"


def _revision(number: int) -> str:
    return f"recipe-{number}.json"


class RunRecord:
    """One run of a store."""

    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.run = run
        self.folder = store.run(run)

    @classmethod
    def create(cls, store: Store, recipe_name: str, record: dict[str, Any]) -> "RunRecord":
        """Take a run id and write the resolved recipe."""
        made = cls(store, store.new_run(recipe_name).id)
        made.folder.write_once(RECIPE, json.dumps(record, indent=1).encode())
        return made

    @classmethod
    def open(cls, store: Store, run: str) -> "RunRecord":
        """An existing run by its id, by the start of it, or `last` for the newest."""
        runs = store.runs()
        if run == "last" and runs:
            return cls(store, runs[-1])
        matches = [known for known in runs if known == run] or [known for known in runs if known.startswith(run)]
        if len(matches) == 1:
            return cls(store, matches[0])
        if matches:
            raise RequestError(f"run {run!r} is the start of {len(matches)} runs: {', '.join(matches[-5:])}")
        known = f"; the newest is {runs[-1]}" if runs else "; it has no runs yet"
        raise RequestError(f"store {store.uri} has no run {run!r}{known}")

    @property
    def local_folder(self) -> Path | None:
        """The run's folder where the store is one on this machine."""
        return None if "://" in self.store.uri else Path(self.store.uri) / "runs" / self.run

    @property
    def raw(self) -> dict[str, Any]:
        """The content of `recipe.json`, or of its newest revision."""
        data, number = self.folder.read(RECIPE), 2
        while (revised := self.folder.find(_revision(number))) is not None:
            data, number = revised, number + 1
        raw: dict[str, Any] = json.loads(data)
        return raw

    def revise(self, record: dict[str, Any]) -> None:
        """Write what the run computes from now on: settings were changed by request. Earlier ones stay readable."""
        number = 2
        while self.folder.find(_revision(number)) is not None:
            number += 1
        self.folder.write_once(_revision(number), json.dumps(record, indent=1).encode())

    def resolved(self) -> Resolved:
        """The recipe that the run executes, its inputs fixed."""
        return Resolved.from_json(self.raw)

    def journal(self) -> Journal:
        """A writer of events; every driver has its own path."""
        at = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(at))
        driver = f"{stamp}-{int(at % 1 * 0x10000):04x}{secrets.token_hex(1)}"  # sorts by time
        return Journal(self.folder.writer(f"{JOURNAL}/{driver}"), driver)

    def write_end(self, journal: Journal) -> None:
        """Write how the run has ended, as the last thing that its driver does."""
        write_end(self.folder, journal.driver, self.run, self.raw)

    def events(self) -> list[dict[str, Any]]:
        """Every event so far, in the order of time."""
        return sorted(self.folder.read_lines(JOURNAL), key=lambda event: float(event["at"]))

    def history(self) -> History:
        """The run's state and what it committed: as its last driver recorded it, else from its journal."""
        ended = find_end(self.folder)
        if ended is not None:
            return ended
        try:
            raw = self.raw
        except RequestError:
            recipe = re.sub(r"-\d{8}-\d{6}-[0-9a-f]{4}$", "", self.run)
            return History(RunSummary(run=self.run, recipe=recipe, state="lost", stages=[]), {})
        return read_history(self.folder, self.run, raw)

    def summary(self) -> RunSummary:
        """The run's state."""
        return self.history().summary

    def fingerprints(self) -> set[str]:
        """Artifacts that the run made, planned to make or imported."""
        try:
            raw = self.raw
        except RequestError:
            return set()
        made = {str(entry["fingerprint"]) for entry in raw["plan"]}
        taken = {str(item["fingerprint"]) for inputs in raw["inputs"].values() for item in inputs.values()}
        return made | taken | self.history().committed.keys()

    def request_stop(self) -> None:
        """Ask the run's driver to stop; it looks every second or so."""
        writer = self.folder.writer(f"{STOPS}/{secrets.token_hex(4)}")
        writer.append({"at": time.time()})
        writer.flush()

    def num_stops(self) -> int:
        """How often a stop was requested."""
        return len(self.folder.segments(STOPS))

    def metrics(self, stage: str) -> Iterator[dict[str, Any]]:
        """Metric lines of a stage, attempt after attempt."""
        return self._by_attempt("metrics", stage)

    def samples(self, stage: str) -> Iterator[dict[str, Any]]:
        """Sample lines of a stage, attempt after attempt."""
        return self._by_attempt("samples", stage)

    def _by_attempt(self, what: str, stage: str) -> Iterator[dict[str, Any]]:
        inside = re.compile(rf"/{what}/{re.escape(stage)}/(\d+)/")
        attempts = {
            int(match.group(1)) for path in self.folder.segments(f"{what}/{stage}") if (match := inside.search(path))
        }
        for attempt in sorted(attempts):
            yield from self.folder.read_lines(f"{what}/{stage}/{attempt}")

    def write_report(self, page: str) -> str:
        """Keep the report in the run's folder; returns its path or address."""
        local = self.local_folder
        if local is not None:
            temporary = local / f".{REPORT}.{secrets.token_hex(4)}"
            temporary.write_text(page)
            os.replace(temporary, local / REPORT)
            return str(local / REPORT)
        number = 1
        while True:
            name = REPORT if number == 1 else f"report-{number}.html"
            with contextlib.suppress(RequestError):
                self.folder.write_once(name, page.encode())
                return f"{self.store.uri}/runs/{self.run}/{name}"
            number += 1


def all_runs(store: Store) -> list[RunRecord]:
    """Every run of a store, oldest first."""
    return [RunRecord(store, run) for run in store.runs()]


def origin_of(store: Store, fingerprint: str, not_run: str, limit: int = 200) -> RunRecord | None:
    """The newest other run that computed this artifact, for the curves of a cached stage."""

    def computed(run: str) -> RunRecord | None:
        record = RunRecord(store, run)
        try:
            is_planned = any(entry["fingerprint"] == fingerprint for entry in record.raw["plan"])
        except RequestError:
            return None
        return record if is_planned and record.history().committed.get(fingerprint) else None

    others = [run for run in reversed(store.runs()[-limit:]) if run != not_run]
    return next((record for record in map_requests(computed, others, store.files) if record is not None), None)
