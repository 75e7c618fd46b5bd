"""Runs handed to a cluster through Ray's job server: the REST interface alone, so nothing of Ray is imported here.

What travels is a command with the run's id and the store's address. The resolved recipe lies in the run's folder of
the store; code is the package installed on the cluster, whose version has to be this one (asked first). Data files are
found on every node under the recipe's paths, or lie in the store.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from launch.capacity.job_server import JobServer, ask_job, is_job_server, shake_hands
from launch.capacity.workers import hardware_of, settle_workers
from launch.checks.memory import check_memory
from launch.inputs.data_check import load_checked
from launch.inputs.data_files import LocalSource, local_sources
from launch.inputs.resolve import resolve
from launch.inputs.resolved import Resolved
from launch.jobs import shared_files
from launch.jobs.upload import note_upload, upload
from launch.records.new_run import new_record
from launch.records.record import RunRecord
from recipes.errors import RequestError
from trainers.store.store import Store

Say = Callable[[str], None]


def require_shared(server: JobServer, resolved: Resolved, sources: Sequence[LocalSource], say: Say) -> None:
    """Refuse data files that not every node has, or has otherwise; raises RecipeError naming node and path."""
    if sources:
        arguments = ["-m", "launch.jobs.shared_files", shared_files.question(resolved, sources)]
        lines = ask_job(server, arguments, "files", shared_files.ANSWER_TIMEOUT_S)
        num_nodes = shared_files.raise_differences(resolved, sources, lines)
        say(f"{_count(sources)} found on {num_nodes} node{'' if num_nodes == 1 else 's'}")


def _count(sources: Sequence[LocalSource]) -> str:
    paths = {path for source in sources for path in source.found.files.values()}
    size = sum(path.stat().st_size for path in paths)
    return f"{len(paths)} data file{'' if len(paths) == 1 else 's'} ({size / 2**20:,.1f} MiB)"


def submit(
    recipe: str | Path,
    *,
    address: str,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    store: str | None = None,
    is_upload: bool = False,
    say: Say = lambda text: None,
) -> str:
    """Check, resolve and hand over; returns the run's id. No run is written before the cluster is known to take it.

    Data files have to lie where every node sees them, under the same path, or go into the store with `is_upload`.
    """
    if not is_job_server(address):
        raise RequestError(f"--address {address}: the job server's address is needed, as in http://HEAD:8265")
    loaded = load_checked(Path(recipe), overrides, smoke)
    server = JobServer(address)
    server.ray_version()
    workers = settle_workers(loaded.recipe, server.nodes())
    opened = Store.open(store)
    opened.probe_writable()
    nodes = shake_hands(server)
    resolved = resolve(loaded, opened, workers, hardware_of(nodes, workers), fetches=True)
    check_memory(resolved, resolved.plan(opened), workers, nodes, only_state=True)
    sources = local_sources(resolved)
    if is_upload:
        resolved = upload(resolved, sources, opened)
        say(f"{_count(sources)} uploaded to {opened.uri}")
    else:
        require_shared(server, resolved, sources, say)
    record = new_record(opened, resolved)
    note_upload(opened, record.run, resolved)
    hand_over(record, server)
    return record.run


def hand_over(record: RunRecord, server: JobServer) -> None:
    """Start a job that drives the run as its folder describes it."""
    arguments = [
        "-m",
        "launch.cli",
        "run",
        "--submitted",
        record.run,
        "--store",
        record.store.uri,
        "--address",
        "auto",
    ]
    submission = server.start_job(arguments, {"trainwright": record.run})
    record.journal().write("run_submitted", address=server.address, submission=submission)


def find_server(resolved: Resolved, store: Store, address: str, say: Say) -> JobServer:
    """The job server of a cluster that can take the resolved recipe; raises what says why it cannot."""
    server = JobServer(address)
    nodes = server.nodes()
    workers = settle_workers(resolved.recipe, nodes)
    check_memory(resolved, resolved.plan(store), workers, nodes, only_state=True)
    shake_hands(server)
    if resolved.uploaded is None:
        require_shared(server, resolved, local_sources(resolved), say)
    return server
