"""Drives one run from its resolved recipe to its end: the one place where a run's parts are put together."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from cluster.protocol import PRELOAD, WorkerGroup, WorkerSpec
from cluster.session import Session, start
from cluster.topology import Request, largest_group
from launch.capacity.room import check_disk
from launch.inputs.resolved import Resolved
from launch.records.journal import Journal, this_driver
from launch.records.record import RunRecord
from launch.records.stage_result import StageResult
from launch.report.progress import View
from launch.report.show import plan_notes, plan_rows, result_rows
from launch.runs.execute_plan import Executor, unanswered_gates
from launch.runs.heartbeat import Heartbeat
from launch.runs.logs import log_folder_of
from launch.runs.stage_entry import ROOM_WAIT_S
from launch.runs.stage_events import StageEvents
from launch.runs.stop import StopSignal, stop_on_signals
from launch.runs.worker_pool import StageWorkers, WorkerPool
from recipes.errors import CapacityError, Preempted, StageError, StoreDamaged, TrainwrightError
from recipes.recipe import Recipe

RUN_STAGE = "launch.runs.stage_entry:run_stage"
VERIFY_CANDIDATE = "launch.runs.stage_entry:verify_candidate"


@dataclass(frozen=True)
class PoolRequest:
    """What a pool is made from."""

    run: str
    resolved: Resolved
    address: str | None
    log_folder: Path
    first_workers: int
    say: Callable[[str], None]
    on_wait: Callable[[str], None]
    """Told what the run waits for; "" when that is over."""
    on_connected: Callable[[Callable[[], None]], None]
    """Called once the cluster answers, before anything waits for it, with a function that cancels the wait."""


MakePool = Callable[[PoolRequest], WorkerPool]


@dataclass
class RunOutcome:
    """What a run came to."""

    results: dict[str, StageResult] = field(default_factory=dict)
    failed: str | None = None
    """The stage that ended the walk."""
    report: str | None = None


def needs_hub(recipe: Recipe) -> bool:
    """Whether a stage reads a data set of the hub; models of the hub are in the store by now."""
    sources = (use.source for stage in recipe.stages.values() for use in stage.sources())
    return any(getattr(source, "revision", None) is not None for source in sources)


def ray_pool(request: PoolRequest) -> WorkerPool:
    """Workers on Ray: an embedded one, or the cluster at the address."""
    cluster = request.resolved.recipe.cluster
    environment = {"HF_HUB_OFFLINE": "0"} if needs_hub(request.resolved.recipe) else {}

    def connect() -> Session:
        return start(
            request.address,
            log_folder=request.log_folder,
            name=request.run,
            preload=PRELOAD,
            environment=environment,
        )

    def make_group(spec: WorkerSpec) -> WorkerGroup:
        from cluster.ray_group import RayGroup  # imports ray, which takes a second

        return RayGroup(session, spec, request.on_wait)

    try:
        session = connect()
    except CapacityError as error:
        if request.address is not None:
            raise
        # Ray gives its own processes some 15 seconds, which a machine that is busy with other things may exceed.
        request.say(f"{error}; trying once more")
        session = connect()
    one = Request(1, 1.0, int(cluster.gpus_per_worker))
    try:
        request.on_connected(session.cancel)
        pool = StageWorkers(
            make_group,
            RUN_STAGE,
            VERIFY_CANDIDATE,
            request.log_folder,
            gpus_per_worker=int(cluster.gpus_per_worker),
            placement_timeout_s=cluster.placement_timeout_s,
            stall_after_s=cluster.stall_after_s,
            environment=environment,
            free_room=lambda: largest_group(one, session.nodes(), free=True),
            on_close=session.shutdown,
        )
        pool.prepare(request.first_workers)
    except BaseException:
        session.shutdown()
        raise
    return pool


def execute_run(
    record: RunRecord, resolved: Resolved, address: str | None, view: View, make_pool: MakePool = ray_pool
) -> RunOutcome:
    """Walk the plan; the journal ends with the run's state, whatever happens to it short of SIGKILL."""
    outcome = RunOutcome()
    stop = StopSignal()
    record.store.wait_for_room(ROOM_WAIT_S, view.say)
    journal = record.journal()
    events = StageEvents(journal, view)
    num_stops = record.num_stops()
    plan = resolved.plan(record.store)
    view.plan(resolved.recipe.name, plan_rows(plan), plan_notes(plan))
    _write_start(journal, resolved, address)
    try:
        with (
            _closing(record, journal, view, outcome),
            stop_on_signals(stop) as install_handlers,
            log_folder_of(record) as log_folder,
            Heartbeat(journal, events.latest, stop, lambda: record.num_stops() > num_stops, events.show_silence),
        ):

            def on_connected(give_up: Callable[[], None]) -> None:
                install_handlers()
                stop.listen(give_up)

            def assemble(first_workers: int) -> WorkerPool:
                return make_pool(
                    PoolRequest(
                        run=record.run,
                        resolved=resolved,
                        address=address,
                        log_folder=log_folder,
                        first_workers=first_workers,
                        say=view.say,
                        on_wait=events.waiting,
                        on_connected=on_connected,
                    )
                )

            check_disk(plan, record.store)
            executor = Executor(
                run=record.run,
                resolved=resolved,
                plan=plan,
                store=record.store,
                events=events,
                pool=assemble,
                stop=stop,
                results=outcome.results,
            )
            try:
                executor.walk()
            except (StageError, StoreDamaged, CapacityError):
                outcome.failed = next((s.name for s in plan.stages if s.name not in outcome.results), None)
                raise
            refused = unanswered_gates(resolved, outcome.results)
            if refused:
                raise StageError("\n".join(refused))
    finally:
        view.results(result_rows(plan, outcome.results, outcome.failed))
        outcome.report = _write_report(record, journal, view)
        _write_end(record, journal, view)
        view.close()
    return outcome


def _write_start(journal: Journal, resolved: Resolved, address: str | None) -> None:
    """Write who drives the run, and where, as this driver's first event."""
    cluster = resolved.recipe.cluster
    journal.write(
        "run_started",
        driver=this_driver(),
        address=address,
        workers=cluster.workers,
        gpus_per_worker=cluster.gpus_per_worker,
        version=version("trainwright"),
        next_s=Heartbeat.FIRST_S,
    )


@contextlib.contextmanager
def _closing(record: RunRecord, journal: Journal, view: View, outcome: RunOutcome) -> Iterator[None]:
    """Write how the run ended as its last event."""
    try:
        yield
    except Preempted as error:
        message = f"{error}; continue it with: trainwright resume {record.run}"
        journal.write("run_finished", state="stopped", exit_code=error.exit_code, message=message)
        raise Preempted(message) from error
    except KeyboardInterrupt:
        message = f"interrupted; continue it with: trainwright resume {record.run}"
        journal.write("run_finished", state="interrupted", exit_code=130, message=message)
        view.say(message)
        raise
    except TrainwrightError as error:
        journal.write("run_finished", state="failed", exit_code=error.exit_code, message=str(error))
        raise
    except BaseException as error:
        message = "".join(traceback.format_exception_only(error)).strip()
        journal.write("run_finished", state="failed", exit_code=1, message=message, traceback=traceback.format_exc())
        raise
    journal.write("run_finished", state="completed", exit_code=0)


def _write_report(record: RunRecord, journal: Journal, view: View) -> str | None:
    """The report page; its failure never hides how the run ended."""
    from launch.report.collect import collect
    from launch.report.page import render

    try:
        path = record.write_report(render(collect(record)))
    except Exception as error:
        view.say(f"the report could not be written: {type(error).__name__}: {error}")
        return None
    journal.write("report_written", path=path)
    view.say(f"report: {path}")
    return path


def _write_end(record: RunRecord, journal: Journal, view: View) -> None:
    """Write the summary that saves others reading the journal; nothing depends on it."""
    try:
        record.write_end(journal)
    except Exception as error:
        view.say(f"the run's end could not be summarised: {type(error).__name__}: {error}")
