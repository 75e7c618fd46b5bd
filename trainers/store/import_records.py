"""Where imported artifacts came from: `refs/imports/<fingerprint>/` has a numbered record for every origin.

The artifact's manifest is that of the first import; what later ones said of the same files stands here, too.
"""

from dataclasses import asdict, dataclass
from importlib.metadata import version

from recipes.errors import StoreDamaged
from trainers.store.place import Files
from trainers.store.refs import RefLog

FOLDER = "refs/imports"


@dataclass(frozen=True)
class Origin:
    """What is known of one import."""

    source: str
    """What the user or the recipe said (`hf://org/name@revision`), else the folder's own name; never its path."""
    bundle: str | None
    """SHA-256 of the index of the bundle that brought it; None: a model folder."""
    version: str
    """Of trainwright."""

    def __str__(self) -> str:
        bundle = f", bundle {self.bundle[:16]}" if self.bundle else ""
        return f"{self.source}{bundle} (trainwright {self.version})"


def note_origin(files: Files, fingerprint: str, source: str, bundle: str | None = None) -> None:
    """Write down where an artifact came from; what is written already is not written twice."""
    origin = Origin(source, bundle, version("trainwright"))
    if origin not in origins(files, fingerprint):
        RefLog(files, f"{FOLDER}/{fingerprint}").append(asdict(origin))


def origins(files: Files, fingerprint: str) -> list[Origin]:
    """Return where an artifact came from, the first import first; raises StoreDamaged for an unreadable record."""
    refs = RefLog(files, f"{FOLDER}/{fingerprint}")
    aside = refs.aside()
    found = []
    for number in refs.numbers():
        if number in aside:
            continue
        record = refs.read(number)
        try:
            found.append(Origin(str(record["source"]), record["bundle"], str(record["version"])))
        except KeyError as error:
            raise StoreDamaged(f"{refs.path(number)}: the record of an import has no {error}") from None
    return found
