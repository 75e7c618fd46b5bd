"""Which stages of which runs took which data sets: empty files by name, so that a collection knows what is in use.

`runs/<run>/datasets/<fingerprint of the stage>/<digest of the data set>`, written before the data set is looked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trainers.store.background_threads import map_requests
from trainers.store.place import Files

FOLDER = "datasets"


@dataclass(frozen=True)
class DatasetUse:
    """A stage of a run took a data set."""

    run: str
    fingerprint: str
    digest: str


def note_use(files: Files, use: DatasetUse) -> None:
    """Write down a use; once more is no error."""
    files.create(f"runs/{use.run}/{FOLDER}/{use.fingerprint}/{use.digest}", b"used")


def all_uses(files: Files) -> Iterator[DatasetUse]:
    """Give every use that was written down."""

    def look(run: str) -> list[str]:
        return list(files.walk(f"runs/{run}/{FOLDER}"))

    for paths in map_requests(look, files.names("runs"), files):
        for parts in (path.split("/") for path in paths):
            if len(parts) == 5:
                yield DatasetUse(parts[1], parts[3], parts[4])
