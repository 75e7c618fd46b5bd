"""The command line. Commands import what they need when they run: `--help` and static `check` stay light."""

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.compare_command import compare
from launch.cli.convert_command import convert
from launch.cli.data_commands import data
from launch.cli.label_command import label
from launch.cli.model_commands import sample, score
from launch.cli.options import Address, AsJson, OnGpus, RecipeFile, RunId, Sets, Smoke, StoreUri, print_json
from launch.cli.rollouts_command import rollouts
from launch.cli.store_commands import store_app
from recipes.errors import CapacityError, RecipeError, RequestError, TrainwrightError

if TYPE_CHECKING:
    from launch.records.journal import RunSummary

app = typer.Typer(
    name="trainwright",
    help="One recipe, the whole chain: pretrain, fine-tune, reward model, PPO, evaluate; on Ray and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"trainwright {version('trainwright')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    recipe: RecipeFile,
    sets: Sets = None,
    smoke: Smoke = False,
    address: Address = None,
    store: StoreUri = None,
    on: OnGpus = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that is wrong with a recipe; with --address, --store or --on also with where it would run."""
    from launch.checks.preflight import check as run_check

    found = run_check(recipe, sets or [], smoke=smoke, store=store, address=address, on=on)
    if as_json:
        print_json(
            {
                "ok": not found.exit_code,
                "problems": [problem.to_json() for problem in found.problems],
                "warnings": found.warnings,
                "rows": [row.to_json() for row in found.rows],
            }
        )
    else:
        for problem in found.problems:
            typer.echo(str(problem), err=True)
        if found.exit_code:
            count = len(found.problems)
            typer.echo(f"{recipe}: {count} problem{'s' if count > 1 else ''}", err=True)
        else:
            for row in found.rows:
                typer.echo("\n".join(row.lines()))
            for warning in found.warnings:
                typer.echo(f"warning: {warning}", err=True)
            typer.echo(f"{recipe}: {found.summary}")
    raise typer.Exit(found.exit_code)


@app.command()
def plan(
    recipe: RecipeFile,
    sets: Sets = None,
    smoke: Smoke = False,
    address: Address = None,
    store: StoreUri = None,
    on: OnGpus = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.001, max=1.0, help="Share of the GPUs' peak that training reaches; without it 0.4."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the stages, which of them the store has already, and what the others will take."""
    from rich.console import Console

    from launch.api import plan as make_plan
    from launch.report.progress import PlainView
    from launch.report.show import plan_notes, plan_rows
    from launch.report.takes import takes_notes, takes_table
    from recipes.planning.cost import UTILISATION

    planned = make_plan(
        recipe, overrides=sets or [], smoke=smoke, store=store, address=address, on=on,
        utilisation=utilisation or UTILISATION,
    )  # fmt: skip
    if as_json:
        print_json(planned.to_json())
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        PlainView(console).plan(planned.recipe, plan_rows(planned), plan_notes(planned))
        console.print()
        console.print(takes_table(planned))
        for note in takes_notes(planned):
            typer.echo(note)
        for misfit in planned.misfits:
            typer.echo(misfit, err=True)
    if planned.misfits:
        raise typer.Exit(CapacityError.exit_code)


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")] = None,
    sets: Sets = None,
    smoke: Smoke = False,
    address: Address = None,
    store: StoreUri = None,
    submitted: Annotated[str | None, typer.Option("--submitted", hidden=True)] = None,
) -> None:
    """Run a recipe's chain; stages that the store has already are not run again."""
    from launch import api
    from launch.report.progress import build_view

    if submitted is not None:
        api.run_submitted(submitted, store=store, address=address, view=build_view())
        return
    if recipe is None:
        raise RequestError("give a recipe: trainwright run RECIPE")
    api.run(recipe, overrides=sets or [], smoke=smoke, store=store, address=address, view=build_view())


@app.command()
def submit(
    recipe: RecipeFile,
    address: Annotated[str, typer.Option("--address", metavar="http://HEAD:8265", help="The cluster's job server.")],
    sets: Sets = None,
    smoke: Smoke = False,
    store: StoreUri = None,
    upload: Annotated[
        bool,
        typer.Option("--upload", help="Put the recipe's data files into the store; else every node must see them."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hand a recipe to a cluster's job server and print the run's id; the store must be reachable from there too."""
    from launch.jobs.submit import submit as submit_recipe

    run_id = submit_recipe(
        recipe,
        overrides=sets or [],
        smoke=smoke,
        store=store,
        address=address,
        is_upload=upload,
        say=lambda text: typer.echo(text, err=True),
    )
    if as_json:
        print_json({"run": run_id})
    else:
        typer.echo(run_id)


@app.command()
def resume(
    run: RunId,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="Compare with this recipe first; a difference is refused."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="Change a placement field, as in cluster.workers=1."),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="FIELD",
            help="Continue although this field has changed, as stages.base.train.steps; the artifacts record it.",
        ),
    ] = None,
    address: Address = None,
    store: StoreUri = None,
) -> None:
    """Continue a run that was stopped, failed or lost its driver, from its last saved state."""
    from launch import api
    from launch.report.progress import build_view

    api.resume(
        run,
        recipe=recipe,
        overrides=sets or [],
        allow_change=allow_change or [],
        store=store,
        address=address,
        view=build_view(),
    )


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's id, the start of one, or 'last'.")] = None,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Show the state of runs, oldest first."""
    from launch.api import status as read_status

    summaries = read_status(run, store=store)
    if as_json:
        print_json([summary.to_json() for summary in summaries])
        return
    if not summaries:
        typer.echo("no runs")
    for summary in summaries:
        _print_summary(summary, in_full=run is not None)


def _print_summary(summary: "RunSummary", in_full: bool) -> None:
    from launch.report.progress import activity

    done = sum(stage.state in ("committed", "cached") for stage in summary.stages)
    typer.echo(f"{summary.run}  {summary.state}  {done}/{len(summary.stages)} stages")
    if summary.message and (in_full or summary.state in ("failed", "lost")):
        typer.echo("  " + summary.message.replace("\n", "\n  "))
    if summary.waiting:
        typer.echo(f"  {summary.waiting}")
    for stage in summary.stages:
        if in_full or stage.state in ("running", "failed"):
            step = f" {stage.step}/{stage.steps}" if stage.step is not None and stage.state == "running" else ""
            phase = f" · {activity(stage.phase)}" if stage.phase and stage.state == "running" else ""
            took = f" in {stage.seconds:.1f} s" if stage.seconds and stage.state == "committed" else ""
            again = f", attempt {stage.attempts}" if stage.attempts > 1 else ""
            typer.echo(f"  {stage.name:<16} {stage.kind:<9} {stage.state}{phase}{step}{took}{again}")
    if in_full and summary.report:
        typer.echo(f"  report: {summary.report}")


@app.command()
def logs(
    run: RunId,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Only this stage's workers.")] = None,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run's workers wrote; without a stage also what its driver noted."""
    from launch.runs.logs import read_logs

    lines = read_logs(run, stage, store=store)
    if as_json:
        print_json([{"source": source, "line": line} for source, line in lines])
        return
    for source, line in lines:
        typer.echo(f"{source}: {line}")


@app.command()
def stop(
    run: RunId,
    store: StoreUri = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the run has saved its state and ended.")
    ] = True,
) -> None:
    """Ask a run to save its state and end; `resume` continues it."""
    from launch.api import stop as stop_run

    summary = stop_run(run, store=store, wait=wait)
    typer.echo(f"{summary.run}: {summary.state}")


@app.command()
def report(
    run: RunId,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the page here instead.")] = None,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's report page again and print where it is."""
    from launch.api import report as write_report

    path = write_report(run, store=store, output=output)
    if as_json:
        print_json({"run": run, "report": path})
    else:
        typer.echo(path)


@app.command()
def doctor(
    address: Address = None,
    store: StoreUri = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure for half a minute what this machine gets done, for `plan`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine, and with --address the cluster, has and lacks."""
    from launch.checks.doctor import examine

    findings = examine(store=store, address=address, calibrates=calibrate)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
    if any(not finding.ok for finding in findings):
        raise typer.Exit(CapacityError.exit_code)


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page instead of the JSON schema.")
    ] = False,
) -> None:
    """Print the recipe's JSON schema."""
    from recipes import reference

    if markdown:
        typer.echo(reference.markdown_reference())
    else:
        print_json(reference.json_schema())


app.command()(convert)
app.command()(compare)
app.command()(label)
app.command()(rollouts)
app.command()(data)
app.command()(data)
app.command()(sample)
app.command()(score)
app.add_typer(store_app, name="store")


def _show_error(error: TrainwrightError) -> None:
    for line in str(error).splitlines() or [type(error).__name__]:
        typer.echo(line, err=True)
    detail = getattr(getattr(error, "verdict", None), "traceback", "")
    if detail and error.exit_code != RequestError.exit_code:  # what is wrong with a request needs no place in the code
        typer.echo("\n" + detail.rstrip(), err=True)
    if isinstance(error, RecipeError) and len(error.problems) > 1:
        typer.echo(f"{len(error.problems)} problems", err=True)


def _keep_traceback(error: BaseException) -> Path:
    handle, name = tempfile.mkstemp(prefix="trainwright-error-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        file.write(f"{sys.argv}\n")
        traceback.print_exception(error, file=file)
    return Path(name)


def _write_no_more() -> None:
    """Send what is still in the output's buffer nowhere: flushing it at the end would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point of the console script; exit codes are those of recipes.errors, 130 when interrupted."""
    try:
        app()
    except TrainwrightError as error:
        _show_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _write_no_more()
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO) and not error.filename:
            _write_no_more()
            typer.echo(f"the output cannot be written: {error.strerror}", err=True)
            sys.exit(CapacityError.exit_code)
        path = _keep_traceback(error)
        typer.echo(
            f"This is a bug in trainwright: {type(error).__name__}: {error}\nThe traceback is in {path}", err=True
        )
        sys.exit(1)
