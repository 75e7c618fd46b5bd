"""`trainwright data`: rows as they will be trained on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import AsJson, RecipeFile, Sets, Smoke, StoreUri, print_json

if TYPE_CHECKING:
    from launch.checks.data_view import Side


def data(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Only this stage's sources.")] = None,
    sets: Sets = None,
    smoke: Smoke = False,
    store: StoreUri = None,
    rows: Annotated[int, typer.Option(min=1, max=1000, help="Rows to show of each source.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as they will be trained on: rendered, tokenised, targets marked; and what is dropped and why."""
    from launch.checks.data_page import counts, data_page, summary
    from launch.checks.data_view import view_data

    views = view_data(recipe, stage, overrides=sets or [], smoke=smoke, store=store, count=rows)
    if as_json:
        print_json([view.to_json() for view in views])
        return
    if html is not None:
        html.write_text(data_page(recipe.name, views), encoding="utf-8")
        typer.echo(html)
        return
    for view in views:
        typer.echo(f"{view.stage}.{view.field}")
        for text in summary(view):
            typer.echo(f"  {text}")
        for row in view.rows:
            typer.echo(f"  {row.row}" + ("" if row.label is None else f", label: {row.label}"))
            for side in row.sides:
                typer.echo(f"    {counts(side)}")
                typer.echo("    " + _marked(side))
    if not views:
        typer.echo("no rows of text to show")


def _marked(side: "Side") -> str:
    """Join tokens by |, those that are learnt underlined, or in brackets where the output is no terminal."""
    written = []
    for token in side.tokens:
        text = token.text.replace("\n", "\\n").replace("\t", "\\t")
        if not token.is_target:
            written.append(text)
        else:
            written.append(typer.style(text, underline=True) if sys.stdout.isatty() else f"[{text}]")
    return "|".join(written)
