"""What is checked before anything runs: the recipe by itself, then where it would run (store, disk, cluster)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.capacity.room import check_disk
from recipes.errors import CapacityError, Problem, RecipeError, RequestError, StoreDamaged, TrainwrightError
from recipes.loaded_recipe import LoadedRecipe
from recipes.loading.load import load_recipe
from recipes.problem_codes import Code
from recipes.rules.static import static_warnings

if TYPE_CHECKING:
    from launch.capacity.workers import Workers
    from launch.checks.row_check import StageRow
    from recipes.planning.plan import Plan
    from trainers.store.store import Store


@dataclass(frozen=True)
class CheckResult:
    """Everything that was found; exit code 0, 2 (the recipe is wrong) or 3 (it cannot run there)."""

    problems: list[Problem] = field(default_factory=list)
    exit_code: int = 0
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    rows: list["StageRow"] = field(default_factory=list)
    """One row of each source of text, as the stage's model gets it."""


def check(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    smoke: bool = False,
    store: str | None = None,
    address: str | None = None,
    on: str | None = None,
) -> CheckResult:
    """The static pass and the first rows; with a store or an address also the environment pass.

    `on`: GPUs that need not be there, as in `8xH100`, in place of an address.
    """
    from launch.checks.further import FurtherCheck

    problems: list[Problem] = []
    loaded: LoadedRecipe | None = None
    further = FurtherCheck(_open_store(store))
    try:
        loaded = load_recipe(Path(recipe), overrides, smoke, further)
    except RecipeError as error:
        problems += error.problems
    found_rows = further.rows
    exit_code = RecipeError.exit_code if problems else 0
    summary = "no problems found"
    if store is not None or address is not None or on is not None:
        found = environment_problems(loaded, store, address, on)
        problems += found.problems
        exit_code = exit_code or found.exit_code
        summary = found.summary
    warnings = [] if loaded is None else [str(warning) for warning in static_warnings(loaded)]
    return CheckResult(problems, exit_code, summary, [*warnings, *found_rows.warnings], found_rows.rows)


def _open_store(store: str | None) -> "Store | None":
    """The given store; None where none is given or it cannot be opened, which the environment pass reports."""
    from trainers.store.store import Store

    try:
        return None if store is None else Store.open(store)
    except TrainwrightError:
        return None


def environment_problems(
    loaded: LoadedRecipe | None, store: str | None, address: str | None, on: str | None = None
) -> CheckResult:
    """Why a run is not possible there; the recipe's needs are left out when it could not be read."""
    from launch.capacity.nodes import nodes_of
    from launch.capacity.workers import hardware_of, imagined_nodes, settle_workers
    from launch.checks.memory import check_memory
    from launch.inputs.resolve import resolve
    from recipes.planning.gpus import parse_gpus
    from trainers.store.store import Store

    problems: list[Problem] = []
    exit_codes: list[int] = []

    def note(code: Code, field_path: str, found: str, error: TrainwrightError) -> None:
        if isinstance(error, RecipeError):
            problems.extend(error.problems)
        elif loaded is not None and field_path in ("cluster.workers", "stages"):
            problems.append(loaded.problem(code, field_path, found, str(error)))
        else:
            problems.append(Problem(code, "command line", None, field_path, found, str(error)))
        exit_codes.append(error.exit_code)

    opened: Store | None = None
    try:
        opened = Store.open(store)
        opened.probe_writable()
    except TrainwrightError as error:
        note(Code.STORE_NOT_USABLE, "--store", str(store or "default"), error)
    workers = None
    try:
        nodes = nodes_of(address) if on is None else imagined_nodes(parse_gpus(on))
    except (CapacityError, RequestError) as error:
        note(Code.CLUSTER_NOT_REACHABLE, "--address" if on is None else "--on", str(on or address), error)
    else:
        try:
            workers = settle_workers(loaded.recipe, nodes) if loaded is not None else None
        except CapacityError as error:
            found = str(loaded.recipe.cluster.workers) if loaded is not None else ""
            note(Code.CLUSTER_TOO_SMALL, "cluster.workers", found, error)
    if loaded is None or opened is None or exit_codes:
        return CheckResult(problems, _worst(exit_codes))
    assert workers is not None
    try:
        resolved = resolve(loaded, opened, workers, hardware_of(nodes, workers))
        plan = resolved.plan(opened)
        if on is None or store is not None:  # machines that are not there have other disks
            check_disk(plan, opened)
    except CapacityError as error:
        note(Code.STORE_TOO_SMALL, "--store", opened.uri, error)
    except StoreDamaged as error:
        note(Code.STORE_DAMAGED, "--store", opened.uri, error)
    except (RecipeError, RequestError) as error:
        note(Code.INPUT_NOT_FOUND, "stages", opened.uri, error)
    else:
        try:
            check_memory(resolved, plan, workers, nodes)
        except CapacityError as error:
            note(Code.MEMORY_TOO_SMALL, "cluster.workers", str(workers.num_workers), error)
        else:
            return CheckResult([], 0, _fits(plan, workers))
    return CheckResult(problems, _worst(exit_codes))


def _fits(plan: "Plan", workers: "Workers") -> str:
    computed = sum(not stage.cached for stage in plan.stages)
    kind = "GPU" if workers.gpus_per_worker else "CPU"
    return (
        f"no problems found, and it fits: {computed} of {len(plan.stages)} stages to compute "
        f"on {workers.num_workers} {kind} worker{'s' if workers.num_workers > 1 else ''}"
    )


def _worst(exit_codes: Sequence[int]) -> int:
    """2 before 5 before 3: a wrong recipe is fixed first."""
    return next((code for code in (2, 5, 3) if code in exit_codes), max(exit_codes, default=0))
