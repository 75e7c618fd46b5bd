"""Which stages of which runs took which data sets: empty files by name, so that a collection knows what is in use.

`runs/<run>/datasets/<fingerprint of the stage>/<digest of the data set>`, written before the data set is looked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trainers.store.files import Files

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
    for run in files.names("runs"):
        for path in files.walk(f"runs/{run}/{FOLDER}"):
            parts = path.split("/")
            if len(parts) == 5:
                yield DatasetUse(run, parts[3], parts[4])
