"""`trainwright store ...`: what a store holds, where it came from, whether it is whole, and taking it elsewhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.errors import RequestError, StoreDamaged

if TYPE_CHECKING:
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store

store_app = typer.Typer(help="Look into a store.", no_args_is_help=True, rich_markup_mode=None)

StoreUri = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URI", help="A folder or s3://..., else $TRAINWRIGHT_STORE, else ~/.trainwright/store."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ArtifactName = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A name, a fingerprint (8 digits or more), store://... or RUN/STAGE.")
]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _open(uri: str | None) -> "Store":
    from trainers.store.store import Store

    return Store.open(uri)


def find_artifact(store: "Store", text: str) -> "ArtifactManifest":
    """The artifact that a name, a fingerprint, a store address or RUN/STAGE means."""
    if text.startswith("store://"):
        text = text.removeprefix("store://")
    run, slash, stage = text.partition("/")
    if not slash:
        return store.resolve(text)
    from launch.records import RunRecord

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
    opened = _open(store)
    artifacts = opened.list_artifacts()
    if as_json:
        _print_json([artifact_json(manifest) for manifest in artifacts])
        return
    if not artifacts:
        typer.echo(f"{opened.uri} holds no artifacts")
    names = opened.names()
    for manifest in artifacts:
        typer.echo(_line(manifest, [name for name, meant in names.items() if meant == manifest.fingerprint]))


@store_app.command()
def show(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Show one artifact's manifest."""
    manifest = find_artifact(_open(store), artifact)
    if as_json:
        _print_json(manifest.model_dump(mode="json"))
        return
    typer.echo(f"fingerprint  {manifest.fingerprint}\ndigest       {manifest.digest}")
    typer.echo(f"kind         {manifest.kind}, made by stage {manifest.stage}")
    typer.echo(f"gate         {'passed' if manifest.gate.passed else 'failed: ' + '; '.join(manifest.gate.reasons)}")
    outcome = manifest.outcome
    rule = f" by {outcome.rule}" if outcome.rule else ""
    typer.echo(f"outcome      {outcome.state}{rule}, {outcome.steps_done} of {outcome.steps_planned} steps")
    if manifest.verification:
        difference = manifest.verification.max_logit_difference
        shown = "" if difference is None else f", largest logit difference {difference:.2g}"
        typer.echo(f"verified     {manifest.verification.how}{shown}")
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
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Read everything back and compare it with its hash; exit 5 when something is damaged."""
    opened = _open(store)
    found = opened.verify(share)
    if as_json:
        damage = [{"path": item.path, "problem": item.problem, "refs": item.refs} for item in found.damage]
        _print_json({"refs": found.refs, "objects": found.objects, "bytes": found.bytes, "damage": damage})
    else:
        typer.echo(f"{found.refs} refs, {found.objects} objects, {found.bytes / 2**20:.1f} MiB read")
        for item in found.damage:
            typer.echo(f"damaged: {item.path}: {item.problem}; needed by {', '.join(item.refs[:4])}", err=True)
        if not found.damage:
            typer.echo("whole")
    if found.damage:
        raise typer.Exit(StoreDamaged.exit_code)


@store_app.command()
def lineage(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Show what an artifact was made from and what was made from it."""
    opened = _open(store)
    found = opened.lineage(find_artifact(opened, artifact).fingerprint)
    if as_json:
        _print_json(
            {
                "artifact": artifact_json(found.artifact),
                "ancestors": [artifact_json(manifest) for manifest in found.ancestors],
                "descendants": [artifact_json(manifest) for manifest in found.descendants],
                "missing": found.missing,
            }
        )
        return
    for title, manifests in (("made from", found.ancestors), ("is", [found.artifact]), ("used in", found.descendants)):
        for manifest in manifests:
            typer.echo(f"{title:<10} {_line(manifest, [])}")
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder in the Hugging Face layout.")],
    name: Annotated[str | None, typer.Option("--name", help="Give it this name too.")] = None,
    store: StoreUri = None,
) -> None:
    """Take a local model folder into the store and print its address."""
    from trainers.store.imports import import_folder

    opened = _open(store)
    manifest = import_folder(opened, folder)
    if name is not None:
        opened.name_artifact(name, manifest.fingerprint)
    typer.echo(f"store://{name or manifest.fingerprint}")


@store_app.command()
def export(
    artifact: ArtifactName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write an adapter merged into its base.")] = False,
    part: Annotated[str | None, typer.Option("--part", help="One of several parts, as critic.")] = None,
    store: StoreUri = None,
) -> None:
    """Write an artifact as a folder that stock transformers and peft open."""
    from trainers.store.export import export as export_artifact

    opened = _open(store)
    export_artifact(opened, find_artifact(opened, artifact), folder, merge=merge, part=part)
    typer.echo(str(folder))
