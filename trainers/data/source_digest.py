"""The identity of the rows of a source: of all that it is made of, and of the evaluation sets that its filters read."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from recipes.data.filters import ByContamination
from recipes.data.images import ImageSource
from recipes.data.text import PlainSource, Source
from trainers.data.filters.contamination import evaluation_sources
from trainers.data.row_forms import RowRole
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import SourceError, naming_member


def source_digest(source: Source | ImageSource, base_dir: Path, role: RowRole = "text") -> str:
    """Return 64 hex digits that change when the rows of a source can change; raises SourceError for missing files."""
    return joined_digest(source, base_dir, lambda own: open_source(own, base_dir, role).digest())


def joined_digest(
    source: Source | ImageSource, base_dir: Path, digest: Callable[[PlainSource | ImageSource], str]
) -> str:
    """Return one digest of all that decides the rows of a source; of a source alone without evaluation sets its own."""
    digests = []
    for member in source.members():
        with naming_member(member):
            digests.append(digest(member.source))
    for path, settings in source.all_filters():
        if isinstance(settings, ByContamination):
            try:
                digests += [open_source(known, base_dir).digest() for known in evaluation_sources(settings.against)]
            except SourceError as error:
                raise SourceError(error.code, error.message, error.suggestion, f"{path}.against") from None
    return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps(digests).encode()).hexdigest()
