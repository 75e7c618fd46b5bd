"""The board of a feedback stage that a person names."""

import re
from collections.abc import Sequence

from launch.label.board import Board
from launch.label.desk import Desk
from launch.records.record import RunRecord
from recipes.errors import RequestError
from recipes.stages.answers import Labelling
from recipes.stages.feedback import ANNOTATOR
from trainers.store.store import Store


def open_labelling(store: Store, place: str, annotators: Sequence[str] | None = None) -> tuple[Labelling, Board, str]:
    """How people judge the pairs of RUN/STAGE, its board, and a title.

    Raises RequestError for a stage that people do not judge, and for one without pairs yet.
    """
    run, _, name = place.partition("/")
    record = RunRecord.open(store, run)
    stage = record.resolved().recipe.stages.get(name)
    asked = None if stage is None else stage.labelling
    if asked is None:
        found = f"{record.run} has no stage {name!r}" if stage is None else f"{name} asks no people"
        raise RequestError(f"{found}; give RUN/STAGE of a stage of kind feedback with judge: people")
    wrong = [found for found in annotators or () if not re.fullmatch(ANNOTATOR, found)]
    if wrong:
        raise RequestError(f"annotator {wrong[0]!r}: letters, digits, '.', '_' and '-', at most 63")
    fingerprint = next(str(entry["fingerprint"]) for entry in record.raw["plan"] if entry["name"] == name)
    desk = Desk(store, record.run, name, fingerprint)
    board = Board(desk, annotators or asked.annotators, twice=asked.twice, labels=asked.labels)
    return asked, board, f"{record.run} / {name}"
