"""`trainwright store ...`: what a store holds, where it came from, whether it is whole, and taking it elsewhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from recipes.errors import CapacityError, RequestError, StoreDamaged

if TYPE_CHECKING:
    from launch.runs.records import RunRecord
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store

store_app = typer.Typer(help="Look into a store.", no_args_is_help=True, rich_markup_mode=None)

HELD = ("objects", "refs", "runs", "leases")
"""A folder that has something in one of these is a store."""

ArtifactName = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A name, a fingerprint (8 digits or more), store://... or RUN/STAGE.")
]


def _open(uri: str | None, *, makes: bool = False) -> "Store":
    """Open a store; a folder that is none is refused unless the command `makes` one: a slip would look empty."""
    from trainers.store.store import Store

    opened = Store.open(uri)
    root = opened.files.root
    if root is not None and not makes and not any(opened.files.names(folder) for folder in HELD):
        raise RequestError(f"there is no store at {root}; a run or `store import` makes one")
    return opened


def find_artifact(store: "Store", text: str) -> "ArtifactManifest":
    """The artifact that a name, a fingerprint, a store address or RUN/STAGE means."""
    if text.startswith("store://"):
        text = text.removeprefix("store://")
    run, slash, stage = text.partition("/")
    if not slash:
        return store.resolve(text)
    from launch.runs.records import RunRecord

    record = RunRecord.open(store, run)
    stage = stage.partition(".")[0]
    for entry in record.summary().stages:
        if entry.name == stage:
            if entry.state not in ("committed", "cached") or entry.fingerprint is None:
                raise RequestError(f"stage {stage} of {record.run} has made nothing yet; it is {entry.state}")
            return store.resolve(entry.fingerprint)
    names = ", ".join(entry.name for entry in record.summary().stages)
    raise RequestError(f"{record.run} has no stage {stage!r}; it has {names}")


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


def _line(manifest: "ArtifactManifest", names: list[str]) -> str:
    size = sum(entry.bytes for entry in manifest.files.values())
    gate = "" if manifest.gate.passed else "  gate failed"
    named = f"  ({', '.join(names)})" if names else ""
    return f"{manifest.fingerprint[:16]}  {manifest.kind:<12} {manifest.stage:<16} {size / 2**20:9.2f} MiB{gate}{named}"


@store_app.command("ls")
def list_artifacts(store: StoreUri = None, as_json: AsJson = False) -> None:
    """List every artifact, parents before what was made from them."""
    opened = _open(store, makes=True)  # where no run was yet, there are none, as `status` says
    artifacts = opened.list_artifacts()
    if as_json:
        print_json([artifact_json(manifest) for manifest in artifacts])
        return
    if not artifacts:
        typer.echo(f"{opened.uri} holds no artifacts")
    names = opened.names()
    for manifest in artifacts:
        typer.echo(_line(manifest, [name for name, meant in names.items() if meant == manifest.fingerprint]))


@store_app.command()
def show(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Show one artifact's manifest."""
    from trainers.store.import_records import origins

    opened = _open(store)
    manifest = find_artifact(opened, artifact)
    imports = origins(opened.files, manifest.fingerprint)
    if as_json:
        print_json({**manifest.model_dump(mode="json"), "imports": [vars(origin) for origin in imports]})
        return
    typer.echo(f"fingerprint  {manifest.fingerprint}\ndigest       {manifest.digest}")
    typer.echo(f"kind         {manifest.kind}, made by stage {manifest.stage}")
    typer.echo(f"gate         {'passed' if manifest.gate.passed else 'failed: ' + '; '.join(manifest.gate.reasons)}")
    outcome = manifest.outcome
    rule = f" by {outcome.rule}" if outcome.rule else ""
    typer.echo(f"outcome      {outcome.state}{rule}, {outcome.steps_done} of {outcome.steps_planned} steps")
    if manifest.verification:
        typer.echo(f"verified     {manifest.verification.text}")
    if manifest.exactness:
        typer.echo(f"exactness    {manifest.exactness}")
    for change in manifest.changes:
        typer.echo(f"changed      {json.dumps(change)}")
    for origin in imports:
        typer.echo(f"imported     from {origin}")
    for path, parent in manifest.parents.items():
        typer.echo(f"from         {path}: {parent.fingerprint[:16]}")
    for name, digest in manifest.data.items():
        typer.echo(f"data         {name}: {digest[:16]}")
    for name, entry in sorted(manifest.files.items()):
        typer.echo(f"file         {name}  {entry.bytes} bytes  {entry.sha256[:16]}")
    for name, value in manifest.metrics.items():
        typer.echo(f"metric       {name}: {json.dumps(value)}")


@store_app.command()
def verify(
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the objects to read, drawn by chance.")
    ] = 1.0,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Set damaged refs aside: nothing is deleted, they are passed over.")
    ] = False,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Read all back and compare it with its hash; exit 5 for damage, 3 for what a later version wrote."""
    from trainers.store import inspection

    opened = _open(store)
    found = inspection.verify(opened, share, set_aside=quarantine)
    if as_json:
        damage = [{"path": item.path, "problem": item.problem, "refs": item.refs} for item in found.damage]
        report = {"refs": found.refs, "objects": found.objects, "bytes": found.bytes, "damage": damage}
        print_json({**report, "aside": found.aside, "later": found.later})
    else:
        typer.echo(f"{found.refs} refs, {found.objects} objects, {found.bytes / 2**20:.1f} MiB read")
        for item in found.damage:
            typer.echo(f"damaged: {item.path}: {item.problem}; needed by {', '.join(item.refs[:4])}", err=True)
        for ref in found.aside:
            typer.echo(f"set aside: {ref}, see quarantine/{ref}", err=True)
        for ref in found.later:
            typer.echo(f"not read: {ref} is of a later format than this version reads", err=True)
        if not found.damage and not found.later:
            typer.echo("whole")
    if found.damage:
        raise typer.Exit(StoreDamaged.exit_code)
    if found.later:
        raise typer.Exit(CapacityError.exit_code)


@store_app.command()
def lineage(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Show what an artifact was made from and what was made from it."""
    from trainers.store import inspection
    from trainers.store.import_records import origins

    opened = _open(store)
    found = inspection.lineage(opened, find_artifact(opened, artifact).fingerprint)
    known = [*found.ancestors, found.artifact, *found.descendants]
    imports = {item.fingerprint: origins(opened.files, item.fingerprint) for item in known}
    if as_json:
        print_json(
            {
                "artifact": artifact_json(found.artifact),
                "ancestors": [artifact_json(manifest) for manifest in found.ancestors],
                "descendants": [artifact_json(manifest) for manifest in found.descendants],
                "missing": found.missing,
                "imports": {item: [vars(origin) for origin in made] for item, made in imports.items() if made},
            }
        )
        return
    for title, manifests in (("made from", found.ancestors), ("is", [found.artifact]), ("used in", found.descendants)):
        for manifest in manifests:
            typer.echo(f"{title:<10} {_line(manifest, [])}")
            for origin in imports[manifest.fingerprint]:
                typer.echo(f"{'':<10} imported from {origin}")
    for fingerprint in found.missing:
        typer.echo(f"gone       {fingerprint}")


@store_app.command()
def name(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower case letters, digits, _ and -.")],
    artifact: ArtifactName,
    store: StoreUri = None,
) -> None:
    """Give an artifact a name that recipes can use as store://NAME."""
    opened = _open(store)
    manifest = find_artifact(opened, artifact)
    opened.name_artifact(name, manifest.fingerprint)
    typer.echo(f"store://{name} is {manifest.fingerprint}")


@store_app.command("import")
def import_model(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A bundle, or a model folder in the Hugging Face layout.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Give it (of a bundle: the last artifact) this name.")
    ] = None,
    digest: Annotated[
        str | None, typer.Option("--digest", help="Of a bundle: refuse it unless an artifact has this digest.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="Where it came from, to be recorded; left out, the folder's name (never its path)."
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapter with its model in base/: take in the merged model, too.")
    ] = False,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Take a bundle, a model folder or what `store export` wrote into the store, every byte checked."""
    from trainers.store.bundle import is_bundle, read_bundle
    from trainers.store.imports import import_folder

    opened = _open(store, makes=True)
    if name is not None:
        opened.check_name(name)
    if is_bundle(folder):
        taken = read_bundle(opened, folder, digest, source=source)
    elif digest is not None:
        raise RequestError(f"--digest: {folder} is not a bundle (it has no bundle.json)")
    else:
        imported = import_folder(opened, folder, source=source)
        taken = [opened.resolve(parent.fingerprint) for parent in imported.parents.values()] + [imported]
        if merge:
            taken.append(_import_merged(opened, imported, source or folder.absolute().name))
    if not taken:
        raise RequestError(f"{folder} holds no artifacts")
    if name is not None:
        opened.name_artifact(name, taken[-1].fingerprint)
    if as_json:
        print_json([artifact_json(manifest) for manifest in taken])
        return
    for manifest in taken[:-1]:
        typer.echo(f"with {_line(manifest, [])}")
    typer.echo(f"store://{name or taken[-1].fingerprint}")


def _import_merged(store: "Store", adapter: "ArtifactManifest", source: str) -> "ArtifactManifest":
    """Take in the model that an imported adapter and its base make together."""
    import tempfile

    from trainers.store.export import export as export_artifact
    from trainers.store.imports import import_folder

    if adapter.kind != "adapter":
        raise RequestError(f"--merge: the folder holds an artifact of kind {adapter.kind}, not an adapter")
    with tempfile.TemporaryDirectory(prefix="trainwright-merge-") as place:
        merged = export_artifact(store, adapter, Path(place) / "merged", merge=True)
        return import_folder(store, merged, source=f"{source}, merged")


@store_app.command()
def export(
    artifact: ArtifactName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write an adapter merged into its base.")] = False,
    part: Annotated[str | None, typer.Option("--part", help="One of several parts, as critic.")] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Write a bundle that `store import` takes into another store.")
    ] = False,
    ancestry: Annotated[
        bool, typer.Option("--lineage", help="With --bundle: also everything that it was made from.")
    ] = False,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Write an artifact as a folder that stock transformers and peft open, or as a bundle for another store."""
    from trainers.store.bundle import write_bundle
    from trainers.store.export import export as export_artifact
    from trainers.store.inspection import lineage as lineage_of

    opened = _open(store)
    manifest = find_artifact(opened, artifact)
    written = [manifest]
    if bundle:
        if merge or part is not None:
            raise RequestError("--bundle carries artifacts as they are; --merge and --part are for model folders")
        if ancestry:
            written = [*reversed(lineage_of(opened, manifest.fingerprint).ancestors), manifest]
        write_bundle(opened, written, folder)
    elif ancestry:
        raise RequestError("--lineage goes with --bundle")
    else:
        export_artifact(opened, manifest, folder, merge=merge, part=part)
    if as_json:
        print_json({"folder": str(folder), "artifacts": [artifact_json(item) for item in written]})
        return
    typer.echo(str(folder))
    if bundle:
        typer.echo(f"digest {manifest.digest}")


@store_app.command()
def pin(
    artifact: Annotated[
        str | None, typer.Argument(metavar="[ARTIFACT]", help="What to pin; left out, the pins are listed.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Why.")] = "",
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Keep an artifact, and all that it was made from, whatever a collection drops."""
    opened = _open(store)
    if artifact is not None:
        manifest = find_artifact(opened, artifact)
        opened.pin(manifest.fingerprint, note)
    pins = opened.pins()
    if as_json:
        print_json([{"fingerprint": fingerprint, "note": text} for fingerprint, text in sorted(pins.items())])
        return
    for fingerprint, text in sorted(pins.items()):
        typer.echo(f"pinned {fingerprint}{f'  {text}' if text else ''}")


@store_app.command()
def unpin(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Take a pin away."""
    opened = _open(store)
    manifest = find_artifact(opened, artifact)
    if not opened.unpin(manifest.fingerprint):
        raise RequestError(f"{manifest.fingerprint[:16]} is not pinned")
    if as_json:
        print_json({"fingerprint": manifest.fingerprint, "pinned": False})
    else:
        typer.echo(f"not pinned any more: {manifest.fingerprint}")


def _kept_by_runs(store: "Store", num_runs: int) -> tuple[set[str], set[str]]:
    """Artifacts that the newest runs, and all unfinished ones, made or took in; and those runs."""
    from launch.runs.records import all_runs
    from trainers.store.background_threads import map_requests

    records = all_runs(store)
    newest = records[len(records) - num_runs :]

    def needs(record: "RunRecord") -> set[str] | None:
        is_kept = record in newest or record.summary().state != "completed"
        return record.fingerprints() if is_kept else None

    found = zip(records, map_requests(needs, records, store.files), strict=True)
    kept = {record.run: needed for record, needed in found if needed is not None}
    return set().union(*kept.values()), set(kept)


@store_app.command()
def gc(
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="HOURS", help="Only what was unneeded and untouched for so long goes.")
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
    """Delete what an earlier pass has listed and nothing needs still, and list what may go next time."""
    from trainers.store.collection import Keep, collect

    opened = _open(store)
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
