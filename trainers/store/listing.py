"""What a store holds at a glance: a few listings, then one or two small reads for each artifact, name and pin."""

import logging
import re
from collections.abc import Callable, Mapping

from recipes.errors import StoreDamaged
from trainers.store.background_threads import map_requests
from trainers.store.manifest import ArtifactManifest, StoreFormat
from trainers.store.objects import ObjectStore
from trainers.store.place import Files
from trainers.store.refs import QUARANTINE, RefLog, numbers_below

log = logging.getLogger("trainwright.store")

ARTIFACTS, NAMES, PINS = "refs/artifacts", "refs/names", "refs/pins"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def ref_logs(files: Files, root: str) -> dict[str, RefLog]:
    """Return the logs of refs in the folders of a folder, by name; what is in them was listed once for all."""
    numbers, aside = numbers_below(files, root), numbers_below(files, f"{QUARANTINE}/{root}")
    logs = {}
    for folder, found in numbers.items():
        listed = (found, set(aside.get(f"{QUARANTINE}/{folder}", ())))
        logs[folder.removeprefix(f"{root}/")] = RefLog(files, folder, listed)
    return logs


def list_artifacts(
    files: Files, objects: ObjectStore, newest: Callable[[RefLog, Mapping[str, int] | None], ArtifactManifest | None]
) -> list[ArtifactManifest]:
    """Return every whole artifact, parents before what was made from them; a warning names the others.

    `newest` gives the newest whole artifact of a ref, by the sizes of all objects where they were listed.
    """
    logs = {name: refs for name, refs in ref_logs(files, ARTIFACTS).items() if _FINGERPRINT.fullmatch(name)}
    sizes = files.sizes("objects") if objects.is_remote and logs else None

    def look(refs: RefLog) -> ArtifactManifest | None:
        try:
            return newest(refs, sizes)
        except (StoreDamaged, StoreFormat) as error:
            log.warning("%s", error)
            return None

    manifests = map_requests(look, logs.values(), files)
    found = {manifest.fingerprint: manifest for manifest in manifests if manifest is not None}
    ordered: dict[str, ArtifactManifest] = {}

    def visit(fingerprint: str) -> None:
        if fingerprint in found:
            manifest = found.pop(fingerprint)
            for parent in manifest.parents.values():
                visit(parent.fingerprint)
            ordered[fingerprint] = manifest

    for manifest in sorted(found.values(), key=lambda item: (item.stage, item.fingerprint)):
        visit(manifest.fingerprint)
    return list(ordered.values())


def list_names(files: Files) -> dict[str, str]:
    """Return every given name with its fingerprint."""
    logs = ref_logs(files, NAMES)
    found = zip(logs, map_requests(named, logs.values(), files), strict=True)
    return {name: fingerprint for name, fingerprint in found if fingerprint is not None}


def named(refs: RefLog) -> str | None:
    """Return the fingerprint that a name means; one that cannot be read is passed over with a warning."""
    for number in reversed(refs.numbers()):
        try:
            return str(refs.read(number)["fingerprint"])
        except (StoreDamaged, KeyError) as error:
            log.warning("name %s: %s is passed over: %s", refs.folder.rpartition("/")[2], refs.path(number), error)
    return None


def list_pins(files: Files) -> dict[str, str]:
    """Return every pinned fingerprint with its note; a pin whose newest word is unreadable counts."""

    def look(refs: RefLog) -> dict[str, object]:
        try:
            return refs.read(refs.highest())
        except StoreDamaged as error:
            return {"pinned": True, "note": str(error)}
        except FileNotFoundError:
            return {}

    logs = ref_logs(files, PINS)
    records = zip(logs, map_requests(look, logs.values(), files), strict=True)
    return {name: str(record.get("note", "")) for name, record in records if record.get("pinned")}
