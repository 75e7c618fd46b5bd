"""`trainwright label`: the page on which people judge the pairs of a feedback stage."""

import contextlib
import threading
from typing import Annotated

import typer

from launch.cli.options import StoreUri


def label(
    place: Annotated[str, typer.Argument(metavar="RUN/STAGE", help="A stage of kind feedback.")],
    store: StoreUri = None,
    annotators: Annotated[
        list[str] | None,
        typer.Option("--annotator", metavar="NAME", help="Who judges, instead of the recipe's; may be given again."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve at, instead of the recipe's.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to serve at, instead of the recipe's; 0: any.")
    ] = None,
) -> None:
    """Serve the page on which people judge a feedback stage's pairs, also while its run is stopped or elsewhere."""
    from launch.label.open import open_labelling
    from launch.label.server import serving
    from trainers.store.store import Store

    asked, board, title = open_labelling(Store.open(store), place, annotators)
    with serving(board, title, host or asked.host, asked.port if port is None else port) as address:
        typer.echo(
            f"{title}: {board.count()} of {board.wanted} labels; served at {address}, a link for each annotator:"
        )
        for name in board.annotators:
            typer.echo(f"  {name}: {board.link(address, name)}")
        typer.echo("Ctrl-C ends it; every label is kept")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
