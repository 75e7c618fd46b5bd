"""Writers that can be killed, traced and frozen, and what they acknowledged."""

from collections.abc import Callable, Iterator

import pytest

from tests.faults.store.children import Nursery


@pytest.fixture
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture: figures are shown by every run."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return print_it
