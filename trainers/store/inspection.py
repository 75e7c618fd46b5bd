"""Looking at a whole store: is everything that is named there and unaltered, and what came from what."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from recipes.errors import RequestError, StoreDamaged
from trainers.store.background_threads import map_requests
from trainers.store.commit_rules import wrong_objects
from trainers.store.manifest import ArtifactManifest, FileEntry, Manifest, StoreFormat, objects_of
from trainers.store.objects import object_path
from trainers.store.refs import NUMBER, QUARANTINE, RefLog
from trainers.store.store import Store

REF_FOLDERS = tuple(
    f"refs/{sort}" for sort in ("artifacts", "datasets", "imports", "names", "pins", "rollouts", "states")
)


@dataclass(frozen=True)
class Damage:
    """One thing that is not what it should be, and the refs that need it."""

    path: str
    problem: str
    refs: list[str]


@dataclass(frozen=True)
class VerifyReport:
    """What a verification read and what it found.

    `aside` are the refs that were set aside, now or before; `later` those that only a later version reads.
    """

    refs: int
    objects: int
    bytes: int
    damage: list[Damage] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadRef:
    """A ref, the hash of the manifest that it names, and the manifest, or why it cannot be read."""

    ref: str
    sha256: str | None
    manifest: Manifest | None
    problem: StoreDamaged | StoreFormat | None


@dataclass(frozen=True)
class Lineage:
    """What an artifact was made from and what was made from it, nearest first; `missing` are inputs that are gone."""

    artifact: ArtifactManifest
    ancestors: list[ArtifactManifest]
    descendants: list[ArtifactManifest]
    missing: list[str]


def all_refs(store: Store) -> Iterator[str]:
    """Give the path of every numbered ref, of whatever sort."""
    for folder in REF_FOLDERS:
        for path in store.files.walk(folder):
            if NUMBER.fullmatch(path.rpartition("/")[2]):
                yield path


def refs_aside(store: Store) -> set[str]:
    """Return the paths of all refs that were set aside as damaged."""
    return {path.removeprefix(f"{QUARANTINE}/") for path in store.files.walk(f"{QUARANTINE}/refs")}


def read_refs(store: Store, refs: Iterable[str]) -> Iterator[ReadRef]:
    """Read refs and the manifests that they name; those that name none, or are gone, are passed over."""

    def look(ref: str) -> ReadRef | None:
        folder, _, number = ref.rpartition("/")
        sha256 = None
        try:
            record = RefLog(store.files, folder).read(int(number))
            if "manifest" not in record:
                return None
            sha256 = str(record["manifest"])
            return ReadRef(ref, sha256, store.read_ref(folder, record), None)
        except FileNotFoundError:
            return None
        except (StoreFormat, StoreDamaged) as error:
            return ReadRef(ref, sha256, None, error)

    return (found for found in map_requests(look, refs, store.files) if found is not None)


def verify(store: Store, share: float = 1.0, seed: int = 0, *, set_aside: bool = False) -> VerifyReport:
    """Read every ref and a share of the objects they need, and report all that is missing or altered.

    With `set_aside` the damaged refs are noted in `quarantine/` and passed over from then on; nothing is deleted. Refs
    that were set aside before are listed and not judged again.
    """
    problems: dict[str, tuple[str, list[str]]] = {}
    needed: dict[str, tuple[FileEntry, list[str]]] = {}
    aside = refs_aside(store)
    manifests: list[tuple[str, Manifest]] = []
    later: list[str] = []
    refs = [ref for ref in all_refs(store) if ref not in aside]
    for found in read_refs(store, refs):
        if isinstance(found.problem, StoreFormat):
            later.append(found.ref)
        elif found.manifest is None:
            problems[found.ref] = (str(found.problem), [found.ref])
        else:
            manifests.append((found.ref, found.manifest))
            for entry in objects_of(found.manifest):
                needed.setdefault(entry.sha256, (entry, []))[1].append(found.ref)
    chooser = random.Random(seed)
    checked = [item for _, item in sorted(needed.items()) if share >= 1 or chooser.random() < share]
    looked_at = {entry for entry, _ in checked}
    for ref, manifest in manifests:
        wrong = wrong_objects(store.objects, manifest, looked_at.intersection(objects_of(manifest)))
        if wrong:
            problems[ref] = (f"is wrong about {len(wrong)} of its objects: {wrong[0]}", [ref])

    def check(entry: FileEntry) -> str | None:
        try:
            store.objects.check(entry)
        except StoreDamaged as error:
            return str(error)
        return None

    wrong_bytes = store.objects.ask(check, [entry for entry, _ in checked])
    for (entry, needing), problem in zip(checked, wrong_bytes, strict=True):
        if problem is not None:
            problems[object_path(entry.sha256)] = (problem, needing)
    damage = [Damage(path, problem, refs) for path, (problem, refs) in sorted(problems.items())]
    for item in damage if set_aside else ():
        for ref in item.refs:
            folder, _, number = ref.rpartition("/")
            RefLog(store.files, folder).set_aside(int(number), item.problem)
            aside.add(ref)
    return VerifyReport(len(refs), len(checked), sum(entry.bytes for entry, _ in checked), damage, sorted(aside), later)


def lineage(store: Store, fingerprint: str) -> Lineage:
    """Follow parents one way and children the other."""
    known = {manifest.fingerprint: manifest for manifest in store.list_artifacts()}
    artifact = known.get(fingerprint)
    if artifact is None:
        raise RequestError(f"store {store.uri} has no artifact {fingerprint}")
    children: dict[str, list[str]] = {}
    for manifest in known.values():
        for parent in manifest.parents.values():
            children.setdefault(parent.fingerprint, []).append(manifest.fingerprint)

    def parents_of(item: str) -> list[str]:
        return [parent.fingerprint for parent in known[item].parents.values()] if item in known else []

    ancestors = reachable([fingerprint], parents_of)
    descendants = reachable([fingerprint], lambda item: children.get(item, []))
    return Lineage(
        artifact,
        [known[item] for item in ancestors if item in known],
        [known[item] for item in descendants],
        [item for item in ancestors if item not in known],
    )


def reachable(start: list[str], neighbours: Callable[[str], list[str]]) -> list[str]:
    """Return everything reachable but the start, nearest first."""
    order: list[str] = []
    frontier = list(start)
    seen = set(start)
    while frontier:
        following = []
        for item in frontier:
            for neighbour in neighbours(item):
                if neighbour not in seen:
                    seen.add(neighbour)
                    order.append(neighbour)
                    following.append(neighbour)
        frontier = following
    return order
