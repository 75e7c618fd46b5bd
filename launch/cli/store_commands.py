"""`trainwright store ...`: what a store holds, where it came from, whether it is whole, and taking it elsewhere."""

import typer

from launch.cli.store_contents import lineage, list_artifacts, show, verify
from launch.cli.store_exchange import export, import_model
from launch.cli.store_replay import replay
from launch.cli.store_retention import gc, name, pin, unpin

store_app = typer.Typer(help="Look into a store.", no_args_is_help=True, rich_markup_mode=None)
store_app.command("ls")(list_artifacts)
store_app.command("import")(import_model)
for command in (show, verify, lineage, name, export, pin, unpin, gc, replay):
    store_app.command()(command)
