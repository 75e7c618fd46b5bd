"""Preferences that a feedback stage has made, read from the store like files of this machine."""

import glob
from collections.abc import Mapping

from recipes.data.text import JsonLines, Mix, PlainSource, Source
from recipes.stages.judged import JudgedTraining
from recipes.stages.kinds import Stage
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

FILE = "preferences.jsonl"


def with_feedback_rows(
    stage: Stage, inputs: Mapping[str, ArtifactManifest], store: Store
) -> tuple[Stage, frozenset[str]]:
    """The stage with every set of preferences that its sources name replaced by its hash-checked file, and the fields
    of these sources: what is held out of such a set among them.
    """

    def read(source: PlainSource, field: str) -> PlainSource:
        if source.made_by is None:
            return source
        selection = (type(source).model_fields.keys() & JsonLines.model_fields.keys()) - {"source"}
        file = glob.escape(str(store.folder(inputs[f"{field}from"]) / FILE))
        return JsonLines(source="jsonl", files=[file], **{name: getattr(source, name) for name in selection})

    def replaced(source: Source, field: str) -> Source:
        if isinstance(source, Mix):
            return source.changed(mix=[read(member.source, field + member.field) for member in source.members()])
        return read(source, field)

    if not isinstance(stage, JudgedTraining):
        return stage, frozenset()
    made = {
        use.field_path
        for use in stage.sources()
        if any(member.source.made_by is not None for member in use.source.members())
    }
    written = {key: source for key in ("data", "evaluation") if (source := getattr(stage, key)) is not None}
    stage = stage.changed(**{key: replaced(source, f"{key}.") for key, source in written.items()})
    return stage, frozenset(made)
