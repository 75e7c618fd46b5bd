"""`trainwright store replay`: what an iteration of reinforcement learning sampled, recomputed and compared."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from launch.cli.store_options import open_store
from recipes.errors import StageError

if TYPE_CHECKING:
    from rlhf.text.replay import Compared


def replay(
    stage: Annotated[str, typer.Argument(metavar="RUN/STAGE", help="A stage of kind rl.")],
    iteration: Annotated[int, typer.Option("--iteration", min=0, help="Which, from 0.")],
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Recompute what an iteration's samples were worth, and draw them again where its policy is kept.

    Exits 1 where anything differs by a bit.
    """
    from launch.runs.replay import replay_stage

    found = replay_stage(open_store(store), stage, iteration)
    if as_json:
        print_json({**asdict(found), "is_equal": found.is_equal})
    else:
        typer.echo(f"iteration {found.iteration}: {found.samples} samples")
        for name, compared in found.rewards.items():
            typer.echo(f"reward {name:<20} {_said(compared, found.samples)}")
        for name, compared in found.drawn.items():
            typer.echo(f"drawn  {name:<20} {_said(compared, found.samples)}")
        if found.not_drawn:
            typer.echo(f"not drawn again: {found.not_drawn}")
        for name, (then, now) in (found.conditions or {}).items():
            typer.echo(f"{name}: {then} in the run, {now} here")
    if not found.is_equal:
        raise typer.Exit(StageError.exit_code)


def _said(compared: "Compared", samples: int) -> str:
    if not compared.differing:
        return "equal"
    most = "" if compared.largest is None else f", by up to {compared.largest:.3g}"
    return f"{compared.differing} of {samples} differ{most}"
