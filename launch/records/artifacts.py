"""The artifact that a person names: by RUN/STAGE, a name, a fingerprint or a store address."""

from typing import TYPE_CHECKING

from recipes.errors import RequestError

if TYPE_CHECKING:
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store


def find_artifact(store: "Store", text: str) -> "ArtifactManifest":
    """The artifact that a name, a fingerprint, a store address or RUN/STAGE means."""
    if text.startswith("store://"):
        text = text.removeprefix("store://")
    run, slash, stage = text.partition("/")
    if not slash:
        return store.resolve(text)
    from launch.records.record import RunRecord

    record = RunRecord.open(store, run)
    stage = stage.partition(".")[0]
    for entry in record.summary().stages:
        if entry.name == stage:
            if entry.state not in ("committed", "cached") or entry.fingerprint is None:
                raise RequestError(f"stage {stage} of {record.run} has made nothing yet; it is {entry.state}")
            return store.resolve(entry.fingerprint)
    names = ", ".join(entry.name for entry in record.summary().stages)
    raise RequestError(f"{record.run} has no stage {stage!r}; it has {names}")
