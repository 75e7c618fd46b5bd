"""What hears of a stage's progress in tests."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext


class Quiet:
    """Hears nothing and never asks to stop; what remembers or asks overrides that."""

    def phase(self, name: str, **progress: float) -> None:
        """Nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def notify(self, text: str) -> None:
        """Nothing."""

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def answers_stops(self, has_unsaved: Callable[[], bool]) -> AbstractContextManager[None]:
        """Stops are answered everywhere."""
        return nullcontext()
