"""The state of a run, submitted ones included."""

from launch.capacity.job_server import job_end
from launch.records.journal import RunSummary
from launch.records.record import RunRecord


def standing(record: RunRecord) -> RunSummary:
    """The state of a run; for a submitted one the job server knows whether its driver is still alive."""
    summary = record.summary()
    if summary.state in ("submitted", "running") and summary.submission and summary.address:
        end = job_end(summary.address, summary.submission)
        if end is not None:
            # The run may have ended properly between the two requests.
            summary = record.summary()
            if summary.state in ("submitted", "running"):
                summary.state, summary.message = "lost", end
    return summary
