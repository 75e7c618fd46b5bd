"""`convert`: a recipe from another system's configuration."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.options import AsJson, print_json


def convert(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="A configuration or a script; and files that are part of it."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RECIPE", help="Write the recipe here.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--from", metavar="SYSTEM", help="What the first FILE is of; else its keys tell.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, metavar="N", help="GPUs that FILE was written for, in all.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, metavar="N", help="Rows of the data, from which RL counts its iterations."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="Where relative paths in FILE start; else here.")
    ] = Path("."),
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="KEY", help="Leave out a key that would be refused.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a recipe from a configuration of axolotl and others, and say what became of each of its keys."""
    from launch.inputs.convert import convert_files
    from recipes.convert.write import report_lines

    found = convert_files(
        files, output, system=system, workers=gpus, rows=rows, working_dir=folder, without=without or []
    )
    if as_json:
        print_json(found.to_json())
        raise typer.Exit(found.exit_code)
    typer.echo(found.summary, err=True)
    for line in report_lines(found.conversion):
        typer.echo(line, err=True)
    for problem in found.problems:
        typer.echo(str(problem), err=True)
    if found.text is None:
        typer.echo("no recipe is written; --without KEY leaves a key out", err=True)
    elif output is None:
        typer.echo(found.text, nl=False)
    for line in found.missing:
        typer.echo(f"still needed: {line}", err=True)
    raise typer.Exit(found.exit_code)
