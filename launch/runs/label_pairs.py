"""A stage whose pairs people judge: workers answer, leave, and the run waits for labels until they are there."""

import contextlib
from collections.abc import Callable
from typing import Any

from cluster.protocol import Json
from launch.label.board import Board
from launch.label.desk import Desk
from launch.runs.stage_events import StageEvents
from launch.runs.stop import StopSignal
from recipes.errors import Preempted, TrainwrightError
from recipes.stages.answers import Labelling
from rlhf.feedback.judgements import PreferenceSet, preference_set
from rlhf.feedback.labelled import LABELLED_FILE, labelled_of, with_labelled
from trainers.store.manifest import FileEntry, files_digest

POLL_S = 1.0


def label_pairs(
    asked: Labelling, desk: Desk, answer: Callable[[], Json], events: StageEvents, stop: StopSignal
) -> dict[str, Any]:
    """Return the stage's result with its set of preferences, once people have judged enough pairs.

    `answer` lets workers make the pairs, which happens once. Raises Preempted when the run is stopped; all labels stay.
    """
    if desk.find() is None:
        desk.lay_out(answer())
    found = desk.find()
    assert found is not None, f"the pairs of {desk.stage} were just written"
    board = Board(desk, asked.annotators, twice=asked.twice, labels=asked.labels)
    _wait(asked, desk, board, events, stop)
    entry = found["result"]["candidate"]["files"].get(LABELLED_FILE)
    judged = [] if entry is None else labelled_of(desk.store.objects.get_bytes(entry["sha256"]))
    pairs, judgements = with_labelled(desk.pairs, board.judgements(), judged)
    made = preference_set(pairs, judgements, asked=board.wanted, min_kappa=asked.min_kappa)
    return {**found["result"], "candidate": _completed(desk, found["result"]["candidate"], made)}


def _wait(asked: Labelling, desk: Desk, board: Board, events: StageEvents, stop: StopSignal) -> None:
    """Serve the page, say where, and return when no further label is needed."""
    if board.is_done():
        return
    from launch.label.server import serving  # packages that only this needs

    with serving(board, f"{desk.run} / {desk.stage}", asked.host, asked.port) as address:
        note = f"waiting for {board.wanted} labels at {address}, or by `trainwright label {desk.run}/{desk.stage}`"
        events.phase(desk.stage, "label", {"notes": [note]})
        for name in board.annotators:  # shown, and not kept in the journal
            events.say(f"  {name}: {board.link(address, name)}")
        shown = None
        while not board.is_done():
            if board.count() != shown:
                shown = board.count()
                place = {"step": shown, "steps": board.wanted, "unit": "label"}
                events.phase(desk.stage, "label", place)
            if stop.wait(POLL_S):
                raise Preempted(f"stopped while {desk.stage} waited for labels; {board.count()} are kept")
            with contextlib.suppress(TrainwrightError, OSError):  # a store that is away for a moment
                board.refresh()


def _completed(desk: Desk, candidate: Json, made: PreferenceSet) -> Json:
    """The workers' candidate with what people said."""
    entries: dict[str, FileEntry] = {name: desk.store.objects.put_chunks([data]) for name, data in made.files.items()}
    return {
        **candidate,
        "files": {name: entry.model_dump(mode="json") for name, entry in entries.items()},
        "digest": files_digest(entries),
        "metrics": {**candidate["metrics"], **made.metrics},
        "gate": {"passed": not made.reasons, "reasons": list(made.reasons)},
    }
