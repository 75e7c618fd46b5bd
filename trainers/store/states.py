"""Training states of one stage of one run: leases, the log that fences stale writers, retention.

`refs/states/<run>/<stage>/` is one log of numbered refs. A commit takes the number after the highest that it sees, and
checks its lease in between; taking a lease also writes a barrier into the log. So of an old writer's commit and the new
lease one comes first: the commit is seen by the new holder, or the old writer finds its number taken and is refused.
Barriers are never removed: a number that an old writer may be about to take stays taken.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.errors import CapacityError, StoreDamaged
from trainers.store.commit_rules import check_belongings, find_owner, named_manifest, owner_mark
from trainers.store.manifest import StateManifest
from trainers.store.objects import ObjectStore, object_path
from trainers.store.place import Files
from trainers.store.refs import QUARANTINE, RefLog

log = logging.getLogger("trainwright.store")


@dataclass(frozen=True)
class _Damaged:
    number: int
    step: int | None
    problem: str


class StateLog:
    """The states and leases of one stage of one run."""

    def __init__(self, files: Files, objects: ObjectStore, run: str, stage: str) -> None:
        self._objects = objects
        self._place = f"{run}/{stage}"
        self._refs = RefLog(files, f"refs/states/{run}/{stage}")
        self._leases = RefLog(files, f"leases/{run}/{stage}")
        self._uri = files.uri

    def take_lease(self) -> int:
        """Take the next lease and fence off every lower one."""
        lease = self._leases.append({"run_stage": self._place})
        self._refs.append({"lease": lease})
        return lease

    def highest_lease(self) -> int:
        """Return the highest lease taken; 0 when there is none."""
        return self._leases.highest()

    def publish(self, content: dict[str, Any], check_lease: Callable[[], None]) -> int:
        """Write the next number of the log; `check_lease` raises when the writer was superseded."""
        while True:
            highest = self._refs.highest()
            check_lease()
            if highest and self._names_manifest(highest, content["manifest"]):
                return highest
            number = highest + 1
            if self._refs.create(number, content):
                return number

    def latest(self, check: Callable[[StateManifest], None]) -> StateManifest | None:
        """Return the newest state for which `check` raises no StoreDamaged; damaged ones are set aside."""
        while True:
            found, has_changed = self._scan(check)
            if found is not None or not has_changed:
                return found
            time.sleep(0.01)

    def check_sizes(self, manifest: StateManifest) -> None:
        """Raise StoreDamaged when an object is missing or has another size."""
        missing = self._objects.missing(manifest.objects())
        if missing:
            raise StoreDamaged(f"{object_path(missing[0].sha256)} is missing or has another size")

    def _scan(self, check: Callable[[StateManifest], None]) -> tuple[StateManifest | None, bool]:
        """Look once; also tells whether retention took away what was listed: then there is something newer."""
        aside = self._refs.aside()
        damaged: list[_Damaged] = []
        has_changed = False
        for number in reversed(self._refs.numbers()):
            manifest: StateManifest | None = None
            step: int | None = None
            try:
                if number in aside:
                    raise StoreDamaged(f"set aside, see {QUARANTINE}/{self._refs.path(number)}")
                record = self._refs.read(number)
                step = _step(record)
                manifest = self._named(record)
                if manifest is not None:
                    check(manifest)
                    check_belongings(self._objects, manifest)
            except (StoreDamaged, FileNotFoundError, KeyError) as error:
                if self._refs.exists(number):
                    damaged.append(_Damaged(number, step if manifest is None else manifest.step, str(error)))
                else:
                    has_changed = True
                continue
            if manifest is None:
                continue
            for bad in damaged:
                if bad.number not in aside:
                    self._fall_back(bad, number, manifest.step)
            return manifest, False
        if damaged and not has_changed:
            listed = "; ".join(f"{self._refs.path(bad.number)}: {bad.problem}" for bad in damaged)
            raise StoreDamaged(f"store {self._uri}: no whole training state: {listed}")
        return None, has_changed

    def _fall_back(self, bad: "_Damaged", used: int, step: int) -> None:
        known = "step unknown" if bad.step is None else f"step {bad.step}"
        lost = "steps lost: unknown" if bad.step is None else f"{bad.step - step} steps lost"
        log.warning(
            "store %s: damaged, %s (step %d) is used instead of %s (%s), %s: %s; %s",
            self._uri, self._refs.path(used), step, self._refs.path(bad.number), known, lost, bad.problem,
            self._noted(bad.number, bad.problem),
        )  # fmt: skip

    def keep(self, keep: int, read_back: StateManifest | None) -> int:
        """Drop all but the newest `keep` states that are whole; nothing when the newest is not (StoreDamaged).

        Every byte of those that stay was read: once by this process, as long as the files are the same. A damaged one
        is set aside; an older whole one stays in its place. `read_back`: its writers have hashed what they wrote as it
        lies in the store; if it is the newest one, that is not read again here.
        """
        if keep < 1:
            raise ValueError(f"keep at least one state, not {keep}")
        candidates = self._candidates()
        if not candidates:
            return 0
        _, newest = candidates.pop(0)
        is_read_back = read_back is not None and set(newest.objects()) == set(read_back.objects())
        if is_read_back:
            self._objects.note_whole(newest.objects())
        if len(candidates) < keep:
            return 0
        for entry in newest.objects() if not is_read_back else ():
            self._objects.check(entry)
        kept = [newest]
        while candidates and len(kept) < keep:
            number, manifest = candidates.pop(0)
            if self._is_whole(number, manifest):
                kept.append(manifest)
        needed = {entry.sha256 for manifest in kept for entry in manifest.objects()}
        for number, manifest in reversed(candidates):
            manifest_hash = str(self._refs.read(number)["manifest"])
            self._refs.remove(number)
            self._objects.remove(manifest_hash)
            mark = owner_mark(manifest.run, manifest.stage, manifest.lease, manifest.step)
            for entry in manifest.objects():
                if entry.sha256 not in needed and self._is_owned(entry.sha256, mark):
                    self._objects.remove(entry.sha256)
        return len(candidates)

    def _candidates(self) -> list[tuple[int, StateManifest]]:
        """Return the states whose manifests and sizes are right, newest first; a warning names the others."""
        found: list[tuple[int, StateManifest]] = []
        aside = self._refs.aside()
        for number in reversed(self._refs.numbers()):
            if number in aside:
                continue
            try:
                manifest = self._read(number)
            except (StoreDamaged, FileNotFoundError, KeyError) as error:
                log.warning("store %s: %s is damaged and stays: %s", self._uri, self._refs.path(number), error)
                continue
            if manifest is not None:
                found.append((number, manifest))
        return found

    def _is_whole(self, number: int, manifest: StateManifest) -> bool:
        """Tell whether every object of a state is right; a state that is damaged is set aside.

        One that the disk does not give now may be whole: it does not count, and is not set aside.
        """
        try:
            for entry in manifest.objects():
                self._objects.demand_whole(entry)
        except StoreDamaged as error:
            is_unread = isinstance(error.__cause__, OSError)
            log.warning(
                "store %s: %s (step %d) is %s, an older one stays in its place: %s%s",
                self._uri, self._refs.path(number), manifest.step, "not to be read" if is_unread else "damaged", error,
                "" if is_unread else f"; {self._noted(number, str(error))}",
            )  # fmt: skip
            return False
        return True

    def _noted(self, number: int, problem: str) -> str:
        """Note that a state is damaged, where the store can be written; says what became of it."""
        try:
            return f"it is kept and noted in {self._refs.set_aside(number, problem)}"
        except CapacityError as error:
            return f"it could not be noted as damaged: {error}"

    def _is_owned(self, sha256: str, mark: str) -> bool:
        """Tell whether an object carries an owner's mark; one that cannot be read stays for a later collection."""
        try:
            return find_owner(self._objects, sha256) == mark
        except StoreDamaged as error:
            log.warning("%s; it is not removed", error)
            return False

    def _names_manifest(self, number: int, sha256: str) -> bool:
        try:
            return bool(self._refs.read(number).get("manifest") == sha256)
        except (StoreDamaged, FileNotFoundError):
            return False

    def at_step(self, step: int) -> StateManifest | None:
        """Return the newest state after so many steps whose manifest and sizes are right; None: it was dropped."""
        return next((manifest for _, manifest in self._candidates() if manifest.step == step), None)

    def manifest(self, number: int) -> StateManifest | None:
        """Return the manifest of a number, whether or not its objects are there; None for a barrier."""
        return self._named(self._refs.read(number))

    def _named(self, record: dict[str, Any]) -> StateManifest | None:
        if "lease" in record:
            return None
        manifest = named_manifest(self._objects, self._refs.folder, record)
        assert isinstance(manifest, StateManifest)
        return manifest

    def _read(self, number: int) -> StateManifest | None:
        """Return the state of a number; None for a barrier."""
        manifest = self.manifest(number)
        if manifest is not None:
            self.check_sizes(manifest)
        return manifest


def _step(record: dict[str, Any]) -> int | None:
    """Return the step that a ref tells, in case its manifest cannot; refs of earlier versions tell none."""
    step = record.get("step")
    return step if type(step) is int and step >= 0 else None
