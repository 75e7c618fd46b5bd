"""Trainwright from Python: `launch.run(recipe)` and the other calls of `launch.api`, loaded when used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.api import check, draw, plan, report, resume, run, sample, score, status, stop, submit

__all__ = ["check", "draw", "plan", "report", "resume", "run", "sample", "score", "status", "stop", "submit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import launch.api

        return getattr(launch.api, name)
    raise AttributeError(f"module 'launch' has no attribute {name!r}")
