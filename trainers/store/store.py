"""The store: artifacts, training states, data sets, names, leases and runs behind one URI (layout in docs/store.md)."""

import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recipes.errors import CapacityError, RequestError, StageError, StoreDamaged
from trainers.store import listing
from trainers.store import materialised_folders as views
from trainers.store.commit_rules import check_belongings, named_manifest, ref_folder, rollouts_folder
from trainers.store.dataset_refs import DatasetUse, note_use
from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    Manifest,
    RolloutsManifest,
    StateManifest,
    manifest_bytes,
    objects_of,
)
from trainers.store.objects import ObjectStore, object_path
from trainers.store.open import open_files
from trainers.store.place import Files, Patience
from trainers.store.refs import RefLog, numbers_below
from trainers.store.runs import Run, list_runs, new_run
from trainers.store.states import StateLog

log = logging.getLogger("trainwright.store")

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

M = TypeVar("M", ArtifactManifest, DatasetManifest, RolloutsManifest)


class Fenced(StageError):  # noqa: N818
    """A writer whose lease was superseded tried to publish."""


@dataclass(frozen=True)
class Committed:
    """What the store holds for a fingerprint after a commit; `first` is False when another run's was there before."""

    manifest: ArtifactManifest
    first: bool


def default_uri() -> str:
    """Return $TRAINWRIGHT_STORE, else ~/.trainwright/store."""
    return os.environ.get("TRAINWRIGHT_STORE") or str(Path.home() / ".trainwright" / "store")


class Store:
    """One store; cheap to open, and every process opens its own by URI."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.uri = files.uri
        self.objects = ObjectStore(files)
        self._user: tuple[str, str] | None = None

    @staticmethod
    def open(uri: str | None = None) -> "Store":
        """Open a folder, s3://, gs:// or memory:// address; writes nothing. None: the default store."""
        return Store(open_files(uri if uri is not None else default_uri()))

    # Artifacts

    def put_artifact(self, manifest: ArtifactManifest) -> Committed:
        """Commit an artifact whose objects are uploaded; the first whole commit from the same parents wins."""
        refs = self._artifact_refs(manifest.fingerprint)
        kept, first = self._publish(refs, manifest, lambda held: held.parents == manifest.parents)
        return Committed(kept, first)

    def find_artifact(self, fingerprint: str) -> ArtifactManifest | None:
        """Return the newest whole artifact of a fingerprint; a damaged one is passed over with a warning.

        Raises StoreDamaged when there are commits and none is whole, StoreFormat when a later version made one.
        """
        return self._newest_whole(self._artifact_refs(fingerprint), ArtifactManifest)

    def list_artifacts(self) -> list[ArtifactManifest]:
        """Return every whole artifact, parents before what was made from them; a warning names the others."""
        return listing.list_artifacts(self._files, self.objects, self.newest_artifact)

    def newest_artifact(self, refs: RefLog, sizes: Mapping[str, int] | None) -> ArtifactManifest | None:
        """Return what `find_artifact` does; `sizes` are those of all objects, where they were listed."""
        return self._newest_whole(refs, ArtifactManifest, sizes=sizes)

    def resolve(self, name_or_fingerprint: str) -> ArtifactManifest:
        """Return the artifact of a given name or of a fingerprint's first digits (8 or more)."""
        fingerprint = self._named(name_or_fingerprint)
        if fingerprint is None and _PREFIX.fullmatch(name_or_fingerprint):
            known = self._files.names(listing.ARTIFACTS)
            matches = [item for item in known if item.startswith(name_or_fingerprint) and _FINGERPRINT.fullmatch(item)]
            if len(matches) > 1:
                listed = ", ".join(match[:16] for match in matches[:8])
                raise RequestError(f"{name_or_fingerprint} is the start of {len(matches)} artifacts: {listed}")
            fingerprint = matches[0] if matches else None
        manifest = None if fingerprint is None else self.find_artifact(fingerprint)
        if manifest is None:
            advice = "give RUN/STAGE, or 8 or more digits of a fingerprint that `store ls` lists"
            if _NAME.fullmatch(name_or_fingerprint):
                advice += f"; `store import FOLDER --name {name_or_fingerprint}` takes in a folder's model"
            raise RequestError(f"store {self.uri} has no artifact {name_or_fingerprint!r}; {advice}")
        return manifest

    def name_artifact(self, name: str, fingerprint: str) -> None:
        """Give an artifact a name; the newest meaning of a name counts."""
        self.check_name(name)
        if self.find_artifact(fingerprint) is None:
            raise RequestError(f"store {self.uri} has no artifact {fingerprint}")
        RefLog(self._files, f"{listing.NAMES}/{name}").append({"fingerprint": fingerprint})

    @staticmethod
    def check_name(name: str) -> None:
        """Raise RequestError for what cannot be a name."""
        if not _NAME.fullmatch(name):
            raise RequestError(f"name {name!r}: lower case letters, digits, _ and -, starting with a letter")

    def names(self) -> dict[str, str]:
        """Return every given name with its fingerprint."""
        return listing.list_names(self._files)

    # Pins

    def pin(self, fingerprint: str, note: str = "") -> None:
        """Keep an artifact, and what it was made from, whatever a collection drops."""
        if self.find_artifact(fingerprint) is None:
            raise RequestError(f"store {self.uri} has no artifact {fingerprint}")
        RefLog(self._files, f"{listing.PINS}/{fingerprint}").append({"pinned": True, "note": note})

    def unpin(self, fingerprint: str) -> bool:
        """Take a pin away; False when there was none."""
        if fingerprint not in self.pins():
            return False
        RefLog(self._files, f"{listing.PINS}/{fingerprint}").append({"pinned": False, "note": ""})
        return True

    def pins(self) -> dict[str, str]:
        """Return every pinned fingerprint with its note; a pin whose newest word is unreadable counts."""
        return listing.list_pins(self._files)

    # Leases and training states

    def take_lease(self, run: str, stage: str) -> int:
        """Take the next lease of a stage of a run; whoever holds a lower one can publish no more."""
        self._files.sweep()
        return self.states(run, stage).take_lease()

    def check_lease(self, run: str, stage: str, lease: int) -> None:
        """Raise Fenced when a higher lease was taken."""
        highest = self.states(run, stage).highest_lease()
        if highest > lease:
            raise Fenced(f"{run}/{stage}: lease {lease} was superseded by lease {highest}; nothing was published")
        if highest < lease:
            raise StageError(f"{run}/{stage}: lease {lease} was never taken; the highest is {highest}")

    def commit_state(self, manifest: StateManifest, lease: int) -> int:
        """Publish a training state whose objects are uploaded; returns its number. A superseded lease raises Fenced."""
        if manifest.lease != lease:
            raise StageError(f"the state of {manifest.run}/{manifest.stage} names lease {manifest.lease}, not {lease}")
        states = self.states(manifest.run, manifest.stage)
        self.check_lease(manifest.run, manifest.stage, lease)
        self._demand_objects(manifest)
        content = {**self._put_manifest(manifest), "step": manifest.step}
        return states.publish(content, lambda: self.check_lease(manifest.run, manifest.stage, lease))

    def latest_state(
        self, run: str, stage: str, *, hashed: bool = True, check: Callable[[StateManifest], None] | None = None
    ) -> StateManifest | None:
        """Return the newest whole training state; a damaged one is passed over with a warning naming both.

        Reads and hashes every byte of it, or with `hashed=False` the manifest alone and compares sizes; a caller that
        spreads the hashing gives a `check` that raises StoreDamaged. Raises StoreDamaged when there are states and
        none is whole, StoreFormat when a later version wrote the newest.
        """
        states = self.states(run, stage)
        return states.latest(check or (self._check_hashes if hashed else states.check_sizes))

    def keep_states(self, run: str, stage: str, keep: int = 2, *, read_back: StateManifest | None = None) -> int:
        """Drop all but the newest `keep` whole states, once these were read back; returns how many went.

        `read_back` is a state whose writers have done so, each its share; another that is the newest is read here.
        Objects go with the states that own them; what was put by anything else stays for a later collection.
        """
        return self.states(run, stage).keep(keep, read_back)

    # Data sets

    def note_datasets(self, run: str, fingerprint: str) -> None:
        """From now on data sets that are looked for or put are noted as in use by this stage of this run."""
        self.run(run)
        self._artifact_refs(fingerprint)
        self._user = (run, fingerprint)

    def find_dataset(self, digest: str) -> DatasetManifest | None:
        """Return the whole data set of a request digest."""
        if self._user is not None:
            note_use(self._files, DatasetUse(*self._user, digest))
        return self._newest_whole(self._dataset_refs(digest), DatasetManifest)

    def put_dataset(self, manifest: DatasetManifest) -> DatasetManifest:
        """Commit a data set whose objects are uploaded; returns what the store holds (the first whole commit)."""
        return self._publish(self._dataset_refs(manifest.digest), manifest)[0]

    # Rollouts

    def put_rollouts(self, manifest: RolloutsManifest, lease: int) -> RolloutsManifest:
        """Commit an iteration's samples whose objects are uploaded; returns what the store holds of it from now on.

        Equal samples are there once, however often the iteration is drawn; others, as another number of workers draws
        them, replace them. A superseded lease raises Fenced.
        """
        self.check_lease(manifest.run, manifest.stage, lease)
        return self._publish(
            RefLog(self._files, ref_folder(manifest)), manifest, lambda held: held.files == manifest.files
        )[0]

    def find_rollouts(self, run: str, stage: str, iteration: int) -> RolloutsManifest | None:
        """Return the samples of an iteration; None: they were not kept."""
        return self._newest_whole(
            RefLog(self._files, f"{self._rollouts(run, stage)}/{iteration:06d}"), RolloutsManifest
        )

    def list_rollouts(self, run: str, stage: str) -> list[int]:
        """Return the iterations whose samples are kept, ascending."""
        return sorted(
            int(folder.rpartition("/")[2]) for folder in numbers_below(self._files, self._rollouts(run, stage))
        )

    def drop_rollouts(self, run: str, stage: str, before: int) -> int:
        """Drop the samples of the iterations before one; returns of how many. Their objects go with a collection."""
        older = [iteration for iteration in self.list_rollouts(run, stage) if iteration < before]
        for iteration in older:
            refs = RefLog(self._files, f"{self._rollouts(run, stage)}/{iteration:06d}")
            for number in refs.numbers():
                refs.remove(number)
        return len(older)

    # Files of artifacts

    def folder(self, manifest: ArtifactManifest | DatasetManifest, prefix: str = "", into: Path | None = None) -> Path:
        """Return a local folder of the manifest's files under `prefix/`, every byte hash-checked; read-only."""
        return views.folder(self.objects, self.uri, manifest.files, prefix, into)

    # Runs

    def new_run(self, recipe_name: str) -> Run:
        """Take a run id of its own and its folder."""
        return new_run(self._files, recipe_name)

    def run(self, run_id: str) -> Run:
        """Return a run's folder, whether or not it holds anything yet."""
        if not _RUN.fullmatch(run_id):
            raise RequestError(f"{run_id!r} is not a run id")
        return Run(self._files, run_id)

    def runs(self) -> list[str]:
        """Return the ids of all runs, oldest first."""
        return list_runs(self._files)

    # The place itself

    def free_bytes(self) -> int | None:
        """Return the space left; None where it is not limited."""
        return self._files.free_bytes()

    def probe_writable(self) -> None:
        """Write, read back and remove a small file; raises CapacityError naming what failed."""
        path, data = f"tmp/probe-{secrets.token_hex(8)}", secrets.token_bytes(64)
        if not self._files.create(path, data) or self._files.create(path, data[::-1]):
            raise CapacityError(f"store {self.uri}: create-only writes do not work there")
        found = self._files.read(path)
        self._files.remove(path)
        if found != data:
            raise CapacityError(f"store {self.uri}: bytes read back differ from those written")

    @property
    def files(self) -> Files:
        """The place itself, for the modules that look at all of it."""
        return self._files

    def wait_for_room(self, limit_s: float, tell: Callable[[str], None]) -> None:
        """From now on writes that find no room are tried again for up to `limit_s`; `tell` hears of it."""
        self._files.patience = Patience(limit_s, tell)

    # Shared by the parts above

    def _artifact_refs(self, fingerprint: str) -> RefLog:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise RequestError(f"{fingerprint!r} is not a fingerprint (64 hex digits)")
        return RefLog(self._files, f"{listing.ARTIFACTS}/{fingerprint}")

    def _dataset_refs(self, digest: str) -> RefLog:
        if not _FINGERPRINT.fullmatch(digest):
            raise RequestError(f"{digest!r} is not a data set's digest (64 hex digits)")
        return RefLog(self._files, f"refs/datasets/{digest}")

    def states(self, run: str, stage: str) -> StateLog:
        """Return the log of a stage's training states and leases."""
        if not _RUN.fullmatch(run) or not _NAME.fullmatch(stage):
            raise RequestError(f"{run}/{stage} is not a stage of a run")
        return StateLog(self._files, self.objects, run, stage)

    def _rollouts(self, run: str, stage: str) -> str:
        if not _RUN.fullmatch(run) or not _NAME.fullmatch(stage):
            raise RequestError(f"{run}/{stage} is not a stage of a run")
        return rollouts_folder(run, stage)

    def _named(self, name: str) -> str | None:
        if not _NAME.fullmatch(name):
            return None
        return listing.named(RefLog(self._files, f"{listing.NAMES}/{name}"))

    def _publish(self, refs: RefLog, manifest: M, stands: Callable[[M], bool] = lambda _: True) -> tuple[M, bool]:
        """Commit unless a whole one is there that `stands`."""
        self._demand_objects(manifest)
        content = self._put_manifest(manifest)
        while True:
            number = refs.highest() + 1  # before the look at what is there: a commit in between takes this number
            try:
                existing = self._newest_whole(refs, type(manifest))
            except StoreDamaged as error:
                log.warning("%s; it is made again", error)
                existing = None
            if existing is not None and stands(existing):
                refs.settle(refs.highest())
                return existing, False
            if refs.create(number, content):
                self._newest_whole(refs, type(manifest), set_aside=True)
                return manifest, True

    def _check_hashes(self, manifest: StateManifest) -> None:
        self.objects.verify_all([entry.sha256 for entry in manifest.objects()])

    def _put_manifest(self, manifest: Manifest) -> dict[str, Any]:
        data = manifest_bytes(manifest)
        return {"manifest": self.objects.put_bytes(data), "bytes": len(data)}

    def _demand_objects(self, manifest: Manifest) -> None:
        missing = self.objects.missing(objects_of(manifest))
        if missing:
            listed = ", ".join(f"{entry.sha256[:12]} ({entry.bytes} bytes)" for entry in missing[:5])
            raise StoreDamaged(f"store {self.uri}: not committed, {len(missing)} objects are missing: {listed}")
        check_belongings(self.objects, manifest)

    def read_ref(self, folder: str, record: dict[str, Any]) -> Manifest:
        """Return the manifest that a ref of a folder names; raises StoreDamaged when it is not whole or another's."""
        return named_manifest(self.objects, folder, record)

    def _newest_whole(
        self, refs: RefLog, wanted: type[M], set_aside: bool = False, sizes: Mapping[str, int] | None = None
    ) -> M | None:
        damaged: dict[int, str] = {}
        aside = refs.aside()
        for number in reversed(refs.numbers()):
            if number in aside:
                continue
            try:
                manifest = self.read_ref(refs.folder, refs.read(number))
                assert isinstance(manifest, wanted)
                missing = self.objects.missing(objects_of(manifest), sizes)
                if missing:
                    raise StoreDamaged(f"{object_path(missing[0].sha256)} is missing or has another size")
            except (StoreDamaged, FileNotFoundError, KeyError) as error:
                damaged[number] = str(error)
                continue
            for bad, problem in damaged.items():
                text = f"damaged, {refs.path(number)} is used instead of {refs.path(bad)}: {problem}"
                log.warning("store %s: %s", self.uri, text)
                if set_aside:
                    refs.set_aside(bad, problem)
            return manifest
        if damaged:
            listed = "; ".join(f"{refs.path(bad)}: {problem}" for bad, problem in damaged.items())
            raise StoreDamaged(f"store {self.uri}: no whole commit: {listed}")
        return None
