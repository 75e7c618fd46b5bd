"""What the commands on a store share: how a store is opened, and how an artifact is shown."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.errors import RequestError

if TYPE_CHECKING:
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store


HELD = ("objects", "refs", "runs", "leases")
"""A folder that has something in one of these is a store."""


ArtifactName = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A name, a fingerprint (8 digits or more), store://... or RUN/STAGE.")
]


def open_store(uri: str | None, *, makes: bool = False) -> "Store":
    """Open a store; a folder that is no store is refused unless the command `makes` one: a typo would look empty."""
    from trainers.store.store import Store

    opened = Store.open(uri)
    root = opened.files.root
    if root is not None and not makes and not any(opened.files.names(folder) for folder in HELD):
        raise RequestError(f"there is no store at {root}; a run or `store import` makes one")
    return opened


def artifact_json(manifest: "ArtifactManifest") -> dict[str, Any]:
    """The stable `store ls --json` form of one artifact."""
    return {
        "fingerprint": manifest.fingerprint,
        "kind": manifest.kind,
        "stage": manifest.stage,
        "digest": manifest.digest,
        "files": {name: entry.sha256 for name, entry in sorted(manifest.files.items())},
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "parents": {path: parent.fingerprint for path, parent in manifest.parents.items()},
        "gate": manifest.gate.model_dump(mode="json"),
    }


def artifact_line(manifest: "ArtifactManifest", names: list[str]) -> str:
    """One line about an artifact and its names."""
    size = sum(entry.bytes for entry in manifest.files.values())
    gate = "" if manifest.gate.passed else "  gate failed"
    named = f"  ({', '.join(names)})" if names else ""
    return f"{manifest.fingerprint[:16]}  {manifest.kind:<12} {manifest.stage:<16} {size / 2**20:9.2f} MiB{gate}{named}"
