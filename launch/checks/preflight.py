"""What is checked before anything runs: the recipe by itself, then where it would run (store, disk, cluster)."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import CapacityError, Problem, RecipeError, RequestError, StoreDamaged, TrainwrightError
from recipes.loading.load import LoadedRecipe
from recipes.models.memory import KEPT_STATES
from recipes.problem_codes import Code
from recipes.rules.static import static_warnings

if TYPE_CHECKING:
    from launch.checks.row_check import StageRow
    from trainers.store.store import Store

SPARE_BYTES = 64 << 20
"""Room for data sets, journal, metrics and logs beside what the stages commit."""


@dataclass(frozen=True)
class CheckResult:
    """Everything that was found; exit code 0, 2 (the recipe is wrong) or 3 (it cannot run there)."""

    problems: list[Problem] = field(default_factory=list)
    exit_code: int = 0
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    rows: list["StageRow"] = field(default_factory=list)
    """One row of each source of text, as the stage's model gets it."""


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """The stable JSON form."""
        return asdict(self)


def check(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    smoke: bool = False,
    store: str | None = None,
    address: str | None = None,
) -> CheckResult:
    """The static pass and the first rows; with a store or an address also the environment pass."""
    from launch.checks.data import load_checked
    from launch.checks.row_check import RowFindings, check_rows

    problems: list[Problem] = []
    loaded: LoadedRecipe | None = None
    found_rows = RowFindings()
    try:
        loaded = load_checked(Path(recipe), overrides, smoke)
    except RecipeError as error:
        problems += error.problems
    else:
        found_rows = check_rows(loaded, _open_store(store))
        problems += found_rows.problems
    exit_code = RecipeError.exit_code if problems else 0
    summary = "the recipe is right"
    if store is not None or address is not None:
        found = environment_problems(loaded, store, address)
        problems += found.problems
        exit_code = exit_code or found.exit_code
        summary = found.summary
    told = [] if loaded is None else [str(warning) for warning in static_warnings(loaded)]
    return CheckResult(problems, exit_code, summary, [*told, *found_rows.warnings], found_rows.rows)


def _open_store(store: str | None) -> "Store | None":
    """The store that was named, where it can be opened; what stands against it is said of it."""
    from trainers.store.store import Store

    try:
        return None if store is None else Store.open(store)
    except TrainwrightError:
        return None


def environment_problems(loaded: LoadedRecipe | None, store: str | None, address: str | None) -> CheckResult:
    """What stands against a run there; the recipe's needs are left out when it could not be read."""
    from launch.checks.nodes import nodes_of
    from launch.runs.capacity import check_memory, hardware_of, settle_workers
    from launch.runs.resolve import resolve
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
        nodes = nodes_of(address)
    except (CapacityError, RequestError) as error:
        note(Code.CLUSTER_NOT_REACHABLE, "--address", str(address), error)
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
        check_disk(plan, opened)
    except CapacityError as error:
        note(Code.STORE_TOO_SMALL, "--store", opened.uri, error)
        return CheckResult(problems, _worst(exit_codes))
    except StoreDamaged as error:
        note(Code.STORE_DAMAGED, "--store", opened.uri, error)
        return CheckResult(problems, _worst(exit_codes))
    except (RecipeError, RequestError) as error:
        note(Code.INPUT_NOT_FOUND, "stages", opened.uri, error)
        return CheckResult(problems, _worst(exit_codes))
    try:
        check_memory(plan, workers, nodes)
    except CapacityError as error:
        note(Code.MEMORY_TOO_SMALL, "cluster.workers", str(workers.num_workers), error)
        return CheckResult(problems, _worst(exit_codes))
    computed = sum(not stage.cached for stage in plan.stages)
    kind = "GPU" if workers.gpus_per_worker else "CPU"
    summary = (
        f"the recipe is right and fits: {computed} of {len(plan.stages)} stages to compute "
        f"on {workers.num_workers} {kind} worker{'s' if workers.num_workers > 1 else ''}"
    )
    return CheckResult([], 0, summary)


def check_disk(plan: Any, store: Any) -> None:
    """Compare what the plan's stages commit with the store's free space; raises CapacityError."""
    free = store.free_bytes()
    waiting = [stage for stage in plan.stages if not stage.cached and stage.sizes is not None]
    if free is None or not waiting:
        return
    # Of each stage the newest states stay, until a collection is asked to drop them; one more is being written.
    artifacts = sum(stage.sizes.artifact_bytes for stage in waiting)
    states = sum(KEPT_STATES * stage.sizes.state_bytes for stage in waiting)
    states += max(stage.sizes.state_bytes for stage in waiting)
    needed = artifacts + states + SPARE_BYTES
    if needed > free:
        raise CapacityError(
            f"store {store.uri} has {free / 2**20:,.0f} MiB free; the run needs about {needed / 2**20:,.0f} MiB "
            f"({artifacts / 2**20:,.0f} MiB of artifacts, {states / 2**20:,.0f} MiB of training state, "
            f"{SPARE_BYTES >> 20} MiB for data, logs and reports)"
        )


def _worst(exit_codes: Sequence[int]) -> int:
    """2 before 5 before 3: a recipe that is wrong is mended first."""
    return next((code for code in (2, 5, 3) if code in exit_codes), max(exit_codes, default=0))


def examine(*, store: str | None = None, address: str | None = None) -> list[Finding]:
    """What this machine and, with an address, the cluster has and lacks."""
    from launch.checks.nodes import examine_nodes, nodes_of
    from trainers.store.store import Store

    findings = [_versions(), _processors(), _shared_memory()]
    try:
        opened = Store.open(store)
        started = time.monotonic()
        opened.probe_writable()
        took = time.monotonic() - started
        free = opened.free_bytes()
        space = "" if free is None else f", {free / 2**30:.1f} GiB free"
        findings.append(Finding("store", True, f"{opened.uri} is writable ({took * 1000:.0f} ms a commit){space}"))
    except TrainwrightError as error:
        findings.append(Finding("store", False, str(error)))
    if address is not None:
        try:
            nodes = nodes_of(address)
            total = f"{sum(node.cpus for node in nodes):g} CPU, {sum(node.gpus for node in nodes):g} GPU"
            findings.append(Finding("cluster", True, f"{address}: {len(nodes)} nodes, {total}"))
            if not address.startswith("http"):
                shared = None if store is None or "://" in store else store
                findings += [
                    Finding(
                        f"{item['node']} {item['check']}",
                        item["is_well"],
                        item["detail"] + (f"; {item['advice']}" if item["advice"] else ""),
                    )
                    for item in examine_nodes(address, shared)
                ]
        except TrainwrightError as error:
            findings.append(Finding("cluster", False, str(error)))
    return findings


def _versions() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found, missing = [], []
    for name in ("trainwright", "torch", "deepspeed", "ray", "transformers", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    detail = ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Finding("packages", not missing, detail)


def _processors() -> Finding:
    from launch.checks.nodes import nodes_of

    node = nodes_of(None)[0]
    said = [f"{node.cpus:g} CPU" + (f" ({node.cpu_bf16})" if node.cpu_bf16 else ""), f"{node.gpus:g} GPU"]
    if node.gpu_capability is not None:
        said[1] += f" (compute capability {node.gpu_capability / 10:.1f}, {node.gpu_memory_bytes / 2**30:.1f} GiB)"
    return Finding("machine", True, f"{', '.join(said)}, {node.memory_bytes / 2**30:.1f} GiB memory")


def _shared_memory() -> Finding:
    found = os.statvfs("/dev/shm")
    free = found.f_bavail * found.f_frsize
    return Finding("/dev/shm", free >= 128 << 20, f"{free / 2**20:,.0f} MiB free")
