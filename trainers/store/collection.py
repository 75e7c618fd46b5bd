"""Garbage collection: what nothing needs any more is listed, and goes when a later pass finds it still unneeded.

Needed is what a kept artifact, a training state, a pin, a name or a living lease leads to, the whole ancestry of kept
artifacts, the rollouts of kept runs, and the data sets that a kept run or the stage of a kept artifact has taken. A
pass first deletes what an earlier pass has listed at least `grace` ago, if it is still unneeded and nobody renewed it
since (writing an object that is there already renews it); then it writes a list of its own. All times are those of the
store's clock. Refs go before the objects that they name. Two passes may run at once.
"""

import logging
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from recipes.errors import RequestError, StoreDamaged
from trainers.store.commit_rules import find_owner
from trainers.store.dataset_refs import DatasetUse, all_uses
from trainers.store.inspection import all_refs, reachable, read_refs, refs_aside
from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    Manifest,
    RolloutsManifest,
    StateManifest,
    StoreFormat,
    objects_of,
)
from trainers.store.refs import RefLog
from trainers.store.store import Store

log = logging.getLogger("trainwright.store")

LISTS = "gc"
DEFAULT_GRACE_S = 24 * 3600.0
"""Longer than any writer takes from an object to the ref that names it."""


@dataclass(frozen=True)
class Keep:
    """What is kept beside pins and names: artifacts by fingerprint, and runs whose states and rollouts stay."""

    artifacts: Collection[str]
    runs: Collection[str]


@dataclass(frozen=True)
class Collected:
    """What a pass deleted, and what it listed for a later one (`waiting`)."""

    removed_refs: list[str] = field(default_factory=list)
    removed_objects: int = 0
    removed_bytes: int = 0
    waiting_refs: list[str] = field(default_factory=list)
    waiting_objects: int = 0
    waiting_bytes: int = 0
    kept_objects: int = 0


@dataclass(frozen=True)
class _Marked:
    objects: dict[str, set[str]]
    """Hashes of the objects that each ref needs, its manifest among them."""
    unneeded_refs: set[str]
    datasets: dict[str, DatasetManifest]
    """Those of the unneeded refs that name a data set."""
    uses: frozenset[DatasetUse]

    def needed(self, without: Collection[str] = ()) -> set[str]:
        """Return the hashes that the refs need, some of them left out."""
        return set().union(*(hashes for ref, hashes in self.objects.items() if ref not in without))


def collect(
    store: Store,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    keep: Keep | None = None,
    finished_states: bool = False,
    dry_run: bool = False,
) -> Collected:
    """Run one pass. Without `keep` every artifact and every run is kept, and only what no ref names goes.

    `finished_states` gives up the training states of stages whose artifact is there. Raises StoreDamaged or
    StoreFormat, before anything is deleted, when a ref cannot be read: what it names is not known.
    """
    if grace_s < 0:
        raise ValueError(f"grace is {grace_s} s")
    if not dry_run:
        store.files.recover()
        store.files.sweep()
    paths = {_sha(path): path for path in store.files.walk("objects")}
    if paths and store.files.root is not None and store.files.names("leases") and not store.files.names("refs"):
        raise StoreDamaged(f"store {store.uri}: nothing was collected: it has objects and leases, and refs/ is missing")
    marked = _mark(store, keep, finished_states)
    if dry_run:
        orphans = _orphans(store, paths, marked.needed(marked.unneeded_refs))
        size = sum(store.objects.ask(lambda path: store.files.size(path) or 0, orphans))
        waiting_refs = sorted(marked.unneeded_refs)
        return Collected([], 0, 0, waiting_refs, len(orphans), size, len(paths) - len(orphans))
    now = _clock(store)
    lists = RefLog(store.files, LISTS)
    due = _due(store, lists, now, grace_s)
    removed_refs = [ref for ref in due.get("refs", []) if ref in marked.unneeded_refs]
    for ref in removed_refs:
        store.files.remove(ref)
    removed_refs = _without_reused_datasets(store, marked, removed_refs)
    orphans = _orphans(store, paths, marked.needed(removed_refs))
    kept = len(paths) - len(orphans)
    listed: dict[str, float] = due.get("objects", {})
    removed, removed_bytes = 0, 0
    for path in sorted(orphans & listed.keys()):
        size = store.files.size(path) or 0
        if store.files.remove_stale(path, float(listed[path])):
            store.objects.forget(_sha(path))
            orphans.discard(path)
            removed, removed_bytes = removed + 1, removed_bytes + size
    ages = zip(sorted(orphans), store.objects.ask(store.files.modified_at, sorted(orphans)), strict=True)
    waiting = {path: at for path, at in ages if at is not None and at <= now - grace_s}
    waiting_bytes = sum(store.objects.ask(lambda path: store.files.size(path) or 0, waiting))
    waiting_refs = sorted(marked.unneeded_refs - set(removed_refs))
    if waiting or waiting_refs:
        lists.append({"objects": waiting, "refs": waiting_refs})
    return Collected(removed_refs, removed, removed_bytes, waiting_refs, len(waiting), waiting_bytes, kept)


def _mark(store: Store, keep: Keep | None, finished_states: bool) -> _Marked:
    manifests = dict(_manifests(store))
    artifacts = {ref: item for ref, (_, item) in manifests.items() if isinstance(item, ArtifactManifest)}
    parents: dict[str, list[str]] = {}
    for artifact in artifacts.values():
        parents.setdefault(artifact.fingerprint, []).extend(p.fingerprint for p in artifact.parents.values())
    if keep is None:
        kept = set(parents)
    else:
        roots = [*keep.artifacts, *store.pins(), *store.names().values()]
        kept = {*roots, *reachable(roots, lambda item: parents.get(item, []))}
    unneeded = {ref for ref, artifact in artifacts.items() if artifact.fingerprint not in kept}
    uses = frozenset(all_uses(store.files))
    used = {use.digest for use in uses if keep is None or use.run in keep.runs or use.fingerprint in kept}
    datasets = {
        ref: item
        for ref, (_, item) in manifests.items()
        if isinstance(item, DatasetManifest) and item.digest not in used
    }
    unneeded |= datasets.keys()
    for ref, (_, item) in manifests.items():
        if isinstance(item, StateManifest | RolloutsManifest):
            is_kept_run = keep is None or item.run in keep.runs
            is_given_up = isinstance(item, StateManifest) and finished_states and item.fingerprint in parents
            if not is_kept_run or is_given_up:
                unneeded.add(ref)
    objects = {ref: {sha, *(entry.sha256 for entry in objects_of(item))} for ref, (sha, item) in manifests.items()}
    return _Marked(objects, unneeded, datasets, uses)


def _without_reused_datasets(store: Store, marked: _Marked, removed: list[str]) -> list[str]:
    """Put back the data sets that somebody took while their refs were removed; returns the other refs.

    Whoever takes one writes that down before looking: seen here, or it found no ref and makes the data set again.
    """
    gone = {ref: marked.datasets[ref] for ref in removed if ref in marked.datasets}
    if not gone:
        return removed
    taken = {use.digest for use in all_uses(store.files) if use not in marked.uses}
    back = {ref for ref, manifest in gone.items() if manifest.digest in taken}
    for ref in back:
        store.put_dataset(gone[ref])
    return [ref for ref in removed if ref not in back]


def _orphans(store: Store, paths: dict[str, str], needed: Collection[str]) -> set[str]:
    """Return the paths of objects that are not needed and not written under a living lease."""
    unneeded = [sha for sha in paths if sha not in needed]
    are_leased = store.objects.ask(lambda sha: _is_leased(store, sha), unneeded)
    return {paths[sha] for sha, is_leased in zip(unneeded, are_leased, strict=True) if not is_leased}


def _manifests(store: Store) -> Iterator[tuple[str, tuple[str, Manifest]]]:
    """Give every ref with the hash of its manifest and the manifest; what was set aside counts where it is readable."""
    aside = refs_aside(store)
    for found in read_refs(store, all_refs(store)):
        if found.manifest is not None:
            yield found.ref, (str(found.sha256), found.manifest)
        elif isinstance(found.problem, StoreFormat):
            raise found.problem
        elif found.ref not in aside and store.files.size(found.ref) is not None:
            raise StoreDamaged(
                f"nothing was collected: {found.ref} is damaged, so what it needs is not known ({found.problem}); set "
                f"it aside with `trainwright store verify --quarantine`"
            ) from found.problem


def _is_leased(store: Store, sha256: str) -> bool:
    """Whether an object that no ref names was written under the newest lease of its stage, and may yet be committed."""
    try:
        owner = find_owner(store.objects, sha256)
    except StoreDamaged as error:
        log.warning("%s; whose it is is not known, and it stays", error)
        return True
    parts = (owner or "").split("/")
    if len(parts) != 4 or not parts[2].isdigit():
        return False
    try:
        return store.states(parts[0], parts[1]).highest_lease() == int(parts[2])
    except RequestError:
        return False


def _clock(store: Store) -> float:
    """Return the present time by the store's clock: that of a file just written."""
    path = f"tmp/clock-{secrets.token_hex(8)}"
    store.files.create(path, b"now", durable=False)
    at = store.files.modified_at(path)
    store.files.remove(path)
    if at is None:
        raise StoreDamaged(f"store {store.uri} does not say when a file was written; nothing was collected")
    return at


def _due(store: Store, lists: RefLog, now: float, grace_s: float) -> dict[str, Any]:
    """Return the newest list that is old enough; older ones are dropped."""
    for number in reversed(lists.numbers()):
        at = store.files.modified_at(lists.path(number))
        if at is None or at > now - grace_s:
            continue
        for older in lists.numbers():
            if older < number:
                lists.remove(older)
        try:
            return lists.read(number)
        except (StoreDamaged, FileNotFoundError) as error:
            log.warning("store %s: %s is not used: %s", store.uri, lists.path(number), error)
            return {}
    return {}


def _sha(path: str) -> str:
    return path.removeprefix("objects/").replace("/", "")
