"""`trainwright compare`: what models have more or less than the first of them, row by row."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from recipes.errors import RequestError, StageError

if TYPE_CHECKING:
    from launch.report.compare import Comparison


def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT...", help="RUN, RUN/STAGE, a name or a fingerprint; one model of it: REPORT:MODEL."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write an HTML page.")] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate", metavar="BENCHMARK.FIGURE=MOST", help="Exit 4 where it may be worse by more than this, at 95 %."
        ),
    ] = None,
    refuses_regressions: Annotated[
        bool, typer.Option("--no-regressions", help="Exit 4 where a figure is worse by more than chance.")
    ] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Where rows differ, compare those that the reports have in common.")
    ] = False,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare evaluations: figures with intervals, paired differences, regressions, rows that changed."""
    from launch.report.compare import compare as compare_sides
    from launch.report.compare import open_sides
    from launch.report.compare_page import compare_page
    from trainers.store.store import Store

    bounds = dict(_bound(text) for text in gates or [])
    found = compare_sides(open_sides(Store.open(store), reports), common=common)
    reasons = found.failed(bounds)
    if refuses_regressions:
        worse = [figure for figure in found.figures if figure.verdict == "worse"]
        reasons += [f"{figure.model} {figure.name}: worse (p = {figure.difference.p:.2g})" for figure in worse]
    if output is not None:
        output.write_text(compare_page(found), encoding="utf-8")
    if as_json:
        print_json({**found.to_json(), "failed": reasons})
    else:
        typer.echo("\n".join(_lines(found)))
    if reasons:
        raise StageError("\n".join(reasons))


def _bound(text: str) -> tuple[str, float]:
    name, _, most = text.rpartition("=")
    try:
        bound = float(most)
    except ValueError:
        bound = -1.0
    if not name or not bound >= 0:
        raise RequestError(f"--gate {text}: BENCHMARK.FIGURE=MOST, as in boolq.acc=0.01")
    return name, bound


def _lines(found: "Comparison") -> list[str]:
    """The comparison as a terminal shows it."""
    from launch.report.compare import LEVEL, interval

    cells = [("figure", "n", found.models[0], "", "", "difference", "p", "", "lost", "gained")]
    for figure in found.figures:
        steps = [figure.step(rows) for rows in figure.changed]
        cells.append((
            figure.name, str(figure.rows), interval(figure.first), figure.model, interval(figure.own),
            interval(figure.difference[:3], signed=True), f"{figure.difference.p:.2g}", figure.verdict,
            str(sum(step < 0 for step in steps)), str(sum(step > 0 for step in steps)),
        ))  # fmt: skip
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    tests = sum(figure.is_judged for figure in found.figures)
    lines += [f"not compared: {text}" for text in found.apart]
    return [*lines, f"marked where p < {LEVEL}: of {tests} tests {LEVEL * tests:.1f} would be by chance"]
