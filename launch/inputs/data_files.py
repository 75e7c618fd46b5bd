"""The data files of a recipe that lie on this machine: what `submit` uploads, or looks for on every node."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.inputs.digests import source_uses
from launch.inputs.resolved import Resolved
from recipes.data.filters import ByContamination
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import Problem, RecipeError, TrainwrightError
from recipes.planning.fingerprint import LOCATION_KEYS
from recipes.problem_codes import Code
from trainers.data.source_files import SourceFiles, source_files


@dataclass(frozen=True)
class LocalSource:
    """A source with files on this machine."""

    field: str
    """Where the recipe has it first."""
    source: Source | ImageSource
    names_images: bool
    """Whether its rows of text name files of images."""
    is_images: bool
    found: SourceFiles
    digest: str

    @property
    def key(self) -> tuple[str, bool]:
        """Equal for equal sources."""
        return self.source.model_dump_json(), self.names_images


def local_sources(resolved: Resolved) -> list[LocalSource]:
    """Every source that has files on this machine, each once; raises RecipeError for files that are not there."""
    found: dict[tuple[str, bool], LocalSource | None] = {}
    problems: list[Problem] = []
    for name, use, names_images in source_uses(resolved.recipe, resolved.external):
        key = (use.source.model_dump_json(), names_images)
        if key in found:
            continue
        field = f"stages.{name}.{use.field_path}"
        try:
            files = source_files(use.source, resolved.base_dir, names_images=names_images)
        except (TrainwrightError, OSError) as error:
            problems.append(Problem(Code.UNREADABLE_DATA, resolved.source, None, field, use.source.source, str(error)))
            continue
        digest, is_images = resolved.data[name][use.field_path], use.facts.is_images
        if files is None:
            found[key] = None
        else:
            found[key] = LocalSource(field, use.source, names_images, is_images, files, digest)
    if problems:
        raise RecipeError(problems)
    return [source for source in found.values() if source is not None]


def places(source: Source | ImageSource) -> list[str]:
    """The paths that a source gives for its files."""
    found: list[str] = []
    for key, value in location_keys(source).items():
        if not key.endswith("revision"):
            found += [value] if isinstance(value, str) else value or []
    return found


def location_keys(source: Source | ImageSource) -> dict[str, Any]:
    """What a source says of where its rows lie, by the key's path: `files`, or `mix.0.files` in a mixture."""
    found = {
        f"{member.field}{key}": getattr(member.source, key)
        for member in source.members()
        for key in LOCATION_KEYS
        if key in type(member.source).model_fields
    }
    for path, settings in source.all_filters():
        if isinstance(settings, ByContamination):
            found[f"{path}.against"] = settings.against
    return found


def set_keys(written: Any, keys: Mapping[str, Any]) -> None:
    """Set keys by their paths in a source as it is written."""
    for path, value in keys.items():
        *outer, last = path.split(".")
        place = written
        for part in outer:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[last] = value
