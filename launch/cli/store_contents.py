"""`trainwright store ls, show, verify, lineage`: what a store holds, where it came from, whether it is whole."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from launch.cli.store_options import ArtifactName, artifact_json, artifact_line, open_store
from launch.records.artifacts import find_artifact
from launch.report.by_model import by_model, text_table
from recipes.errors import CapacityError, StoreDamaged
from recipes.stages.suites import noise_findings


def list_artifacts(store: StoreUri = None, as_json: AsJson = False) -> None:
    """List every artifact, parents before what was made from them."""
    opened = open_store(store, makes=True)  # where no run was yet, there are none, as `status` says
    artifacts = opened.list_artifacts()
    if as_json:
        print_json([artifact_json(manifest) for manifest in artifacts])
        return
    if not artifacts:
        typer.echo(f"{opened.uri} holds no artifacts")
    names = opened.names()
    for manifest in artifacts:
        typer.echo(artifact_line(manifest, [name for name, meant in names.items() if meant == manifest.fingerprint]))


def show(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Show one artifact's manifest."""
    from trainers.store.import_records import origins

    opened = open_store(store)
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
    if manifest.kind == "report":
        _show_report(manifest.metrics)
        return
    for name, value in manifest.metrics.items():
        typer.echo(f"metric       {name}: {json.dumps(value)}")


def _show_report(metrics: Mapping[str, Any]) -> None:
    """Models side by side, next to the truth and to noise."""
    models, table, plain = by_model(metrics)
    for name, value in plain.items():
        typer.echo(f"metric       {name}: {json.dumps(value)}")
    for line in text_table(models, table):
        typer.echo(line)
    for finding in noise_findings(metrics):
        typer.echo(f"warning      {finding}")


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

    opened = open_store(store)
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


def lineage(artifact: ArtifactName, store: StoreUri = None, as_json: AsJson = False) -> None:
    """Show what an artifact was made from and what was made from it."""
    from trainers.store import inspection
    from trainers.store.import_records import origins

    opened = open_store(store)
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
            typer.echo(f"{title:<10} {artifact_line(manifest, [])}")
            for origin in imports[manifest.fingerprint]:
                typer.echo(f"{'':<10} imported from {origin}")
    for fingerprint in found.missing:
        typer.echo(f"missing    {fingerprint}")
