"""`trainwright store name, pin, unpin, gc`: what a store keeps, and what may be deleted."""

from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from launch.cli.store_options import ArtifactName, open_store
from launch.records.artifacts import find_artifact
from recipes.errors import RequestError

if TYPE_CHECKING:
    from launch.records.record import RunRecord
    from trainers.store.store import Store


def name(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower case letters, digits, _ and -.")],
    artifact: ArtifactName,
    store: StoreUri = None,
) -> None:
    """Give an artifact a name that recipes can use as store://NAME."""
    opened = open_store(store)
    manifest = find_artifact(opened, artifact)
    opened.name_artifact(name, manifest.fingerprint)
    typer.echo(f"store://{name} is {manifest.fingerprint}")


def pin(
    artifact: Annotated[
        str | None, typer.Argument(metavar="[ARTIFACT]", help="What to pin; left out, the pins are listed.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Why.")] = "",
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Keep an artifact, and all that it was made from, whatever a collection drops."""
    opened = open_store(store)
    if artifact is not None:
        manifest = find_artifact(opened, artifact)
        opened.pin(manifest.fingerprint, note)
    pins = opened.pins()
    if as_json:
        print_json([{"fingerprint": fingerprint, "note": text} for fingerprint, text in sorted(pins.items())])
        return
    for fingerprint, text in sorted(pins.items()):
        typer.echo(f"pinned {fingerprint}{f'  {text}' if text else ''}")


def unpin(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Remove a pin."""
    opened = open_store(store)
    manifest = find_artifact(opened, artifact)
    if not opened.unpin(manifest.fingerprint):
        raise RequestError(f"{manifest.fingerprint[:16]} is not pinned")
    if as_json:
        print_json({"fingerprint": manifest.fingerprint, "pinned": False})
    else:
        typer.echo(f"no longer pinned: {manifest.fingerprint}")


def _kept_by_runs(store: "Store", num_runs: int) -> tuple[set[str], set[str]]:
    """Artifacts that the newest runs, and all unfinished ones, made or imported; and those runs."""
    from launch.records.record import all_runs
    from trainers.store.background_threads import map_requests

    records = all_runs(store)
    newest = records[len(records) - num_runs :]

    def needs(record: "RunRecord") -> set[str] | None:
        is_kept = record in newest or record.summary().state != "completed"
        return record.fingerprints() if is_kept else None

    found = zip(records, map_requests(needs, records, store.files), strict=True)
    kept = {record.run: needed for record, needed in found if needed is not None}
    return set().union(*kept.values()), set(kept)


def gc(
    grace: Annotated[
        float,
        typer.Option(min=0.0, metavar="HOURS", help="Only what was unneeded and untouched for so long is deleted."),
    ] = 24.0,
    keep_runs: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Keep what the newest N runs and unfinished ones need, pins, names; drop the rest."
        ),
    ] = None,
    finished_states: Annotated[
        bool, typer.Option("--finished-states", help="Drop the training states of stages that are committed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what nothing needs; write nothing.")] = False,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Delete what an earlier pass listed and is still unneeded, and list what a later pass may delete."""
    from trainers.store.collection import Keep, collect

    opened = open_store(store)
    keep = None if keep_runs is None else Keep(*_kept_by_runs(opened, keep_runs))
    found = collect(opened, grace_s=grace * 3600, keep=keep, finished_states=finished_states, dry_run=dry_run)
    if as_json:
        print_json({**vars(found), "dry_run": dry_run})
        return
    if not dry_run:
        typer.echo(
            f"deleted {len(found.removed_refs)} refs and {found.removed_objects} objects "
            f"({found.removed_bytes / 2**20:.1f} MiB)"
        )
    when = "not needed by anything" if dry_run else f"may go by a pass in {grace:g} hours or later"
    size = f"{found.waiting_bytes / 2**20:.1f} MiB"
    typer.echo(f"{len(found.waiting_refs)} refs and {found.waiting_objects} objects ({size}) {when}")
    typer.echo(f"{found.kept_objects} objects are kept")
