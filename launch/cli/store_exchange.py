"""`trainwright store import, export`: models and bundles into a store and out of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from launch.cli.store_options import ArtifactName, artifact_json, artifact_line, open_store
from launch.records.artifacts import find_artifact
from recipes.errors import RequestError

if TYPE_CHECKING:
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store

Layout = Literal["folder", "gguf"]
Precision = Literal["f32", "f16", "bf16", "q8_0"]
"""As `trainers.models.gguf_export` has it, which the command line does not import before it is needed."""


def import_model(
    folder: Annotated[
        Path,
        typer.Argument(metavar="PLACE", help="A bundle, a model folder in the Hugging Face layout, or a GGUF file."),
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
    """Take a bundle, a model folder, a GGUF file or what `store export` wrote into the store, every byte checked."""
    from recipes.models.folders import find_sentencepiece
    from trainers.models.imports import import_folder, import_merged
    from trainers.store.bundle import is_bundle, read_bundle
    from trainers.store.foreign_checkpoints import left_behind
    from trainers.store.untrusted_files import is_gguf

    opened = open_store(store, makes=True)
    if name is not None:
        opened.check_name(name)
    if is_bundle(folder):
        taken = read_bundle(opened, folder, digest, source=source)
    elif digest is not None:
        raise RequestError(f"--digest: {folder} is not a bundle (it has no bundle.json)")
    elif is_gguf(folder):
        taken = [_import_gguf(opened, folder, source)]
    elif (sentences := find_sentencepiece(folder)) is not None:
        taken = [_import_sentencepiece(opened, folder, sentences, source)]
    else:
        imported = import_folder(opened, folder, source=source)
        for line in left_behind(folder):
            typer.echo(line, err=True)
        taken = [opened.resolve(parent.fingerprint) for parent in imported.parents.values()] + [imported]
        if merge:
            taken.append(import_merged(opened, imported, source or folder.absolute().name))
    if not taken:
        raise RequestError(f"{folder} holds no artifacts")
    if name is not None:
        opened.name_artifact(name, taken[-1].fingerprint)
    if as_json:
        print_json([artifact_json(manifest) for manifest in taken])
        return
    for manifest in taken[:-1]:
        typer.echo(f"with {artifact_line(manifest, [])}")
    typer.echo(f"store://{name or taken[-1].fingerprint}")


def _import_gguf(store: "Store", file: Path, source: str | None) -> "ArtifactManifest":
    """Take in the model of a GGUF file."""
    import tempfile

    from trainers.models.gguf_import import write_folder
    from trainers.models.imports import import_folder

    with tempfile.TemporaryDirectory(prefix="trainwright-gguf-") as place:
        write_folder(file, Path(place) / "model")
        return import_folder(store, Path(place) / "model", source=source or file.name)


def _import_sentencepiece(store: "Store", folder: Path, name: str, source: str | None) -> "ArtifactManifest":
    """Take in a model whose tokenizer is a sentencepiece model."""
    import tempfile

    from trainers.models.imports import import_folder
    from trainers.models.sentencepiece_import import write_folder

    with tempfile.TemporaryDirectory(prefix="trainwright-sentencepiece-") as place:
        write_folder(folder, name, Path(place) / "model")
        return import_folder(store, Path(place) / "model", source=source or folder.absolute().name)


def export(
    artifact: ArtifactName,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or is empty; of GGUF a new file.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Write an adapter merged into its base.")] = False,
    part: Annotated[str | None, typer.Option("--part", help="One of several parts, as critic.")] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Write a bundle that `store import` takes into another store.")
    ] = False,
    ancestry: Annotated[
        bool, typer.Option("--lineage", help="With --bundle: also everything that it was made from.")
    ] = False,
    to: Annotated[Layout, typer.Option("--to", help="A model folder, or one GGUF file (adapters merged).")] = "folder",
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="With --to gguf: how matrices are stored, bf16 by default.")
    ] = None,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Write an artifact as a folder for stock transformers and peft, a GGUF file, or a bundle for another store."""
    from trainers.store.bundle import write_bundle
    from trainers.store.export import export as export_artifact
    from trainers.store.inspection import lineage as lineage_of

    opened = open_store(store)
    manifest = find_artifact(opened, artifact)
    written = [manifest]
    if precision is not None and to != "gguf":
        raise RequestError("--precision goes with --to gguf")
    if to == "gguf":
        if bundle:
            raise RequestError("--bundle carries artifacts as they are; --to gguf writes a file")
        change = _export_gguf(opened, manifest, folder, part, precision or "bf16")
    elif bundle:
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
    if to == "gguf":
        typer.echo(f"rounding changes the next token by {change:.2g} nats on average (KL)")
    if bundle:
        typer.echo(f"digest {manifest.digest}")


def _export_gguf(
    store: "Store", manifest: "ArtifactManifest", file: Path, part: str | None, precision: Precision
) -> float:
    """Write an artifact's model, adapters merged, as a GGUF file; returns what its rounding changes."""
    import tempfile

    from trainers.models.gguf_export import write_gguf
    from trainers.store.export import export as export_artifact

    with tempfile.TemporaryDirectory(prefix="trainwright-gguf-") as place:
        merged = export_artifact(store, manifest, Path(place) / "model", merge=True, part=part)
        if not (merged / "config.json").is_file():
            raise RequestError(f"{manifest.stage} is of kind {manifest.kind}; a GGUF file holds a language model")
        return write_gguf(merged, file.absolute(), precision)
