"""`trainwright rollouts`: what a stage of reinforcement learning sampled, as one page."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.options import StoreUri


def rollouts(
    stage: Annotated[str, typer.Argument(metavar="RUN/STAGE", help="A stage of kind rl.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")],
    store: StoreUri = None,
    most: Annotated[int, typer.Option(min=1, max=10**6, help="Most samples, of iterations evenly.")] = 2000,
    log_ratios: Annotated[
        bool,
        typer.Option(
            help="Shade tokens by how far the policy left its start, which reads every sample: a forward pass of the "
            "start for each, most of the command's time."
        ),
    ] = True,
) -> None:
    """Write one HTML page that searches, sorts and filters a stage's kept rollouts, groups side by side."""
    from launch.report.rollouts import rollouts_page
    from launch.runs.replay import recorded_stage
    from rlhf.text.kept_rollouts import read_rollouts
    from trainers.store.store import Store

    spec, context = recorded_stage(Store.open(store), stage)
    if log_ratios:
        typer.echo(
            f"reading up to {most} samples by the policy's start; --no-log-ratios shows what the sampler saw, at once"
        )
    found = read_rollouts(spec, context, most, log_ratios=log_ratios)
    value = "log-ratio to the start" if log_ratios else "log-probability"
    output.write_text(rollouts_page(f"{context.run} / {context.stage}", found, value), encoding="utf-8")
    typer.echo(f"{output}: {len(found['samples'])} samples of {len(found['iterations'])} iterations")
