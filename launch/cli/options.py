"""Options and output that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, the start of one, or 'last'.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Set a field, as in stages.base.train.steps=100.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink the recipe to its tiny CPU form.")]
StoreUri = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URI", help="A folder or s3://..., else $TRAINWRIGHT_STORE, else ~/.trainwright/store."
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="A", help="An existing Ray cluster; without it an embedded one is started."),
]
OnGpus = Annotated[
    str | None, typer.Option("--on", metavar="NxGPU", help="For GPUs that need not be there, as in 8xH100.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
