"""How a run stands, submitted ones included."""

from launch.capacity.job_server import job_end
from launch.records.journal import RunSummary
from launch.records.record import RunRecord


def standing(record: RunRecord) -> RunSummary:
    """How a run stands; for a submitted one the job server knows whether its driver still lives."""
    summary = record.summary()
    if summary.state in ("submitted", "running") and summary.submission and summary.address:
        end = job_end(summary.address, summary.submission)
        if end is not None:
            # The run may have ended properly between the two questions.
            summary = record.summary()
            if summary.state in ("submitted", "running"):
                summary.state, summary.message = "lost", end
    return summary
