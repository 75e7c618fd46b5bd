"""Labels of people: who judges what, what is kept, what the page answers to whom, and how a run waits."""

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from launch.label.board import Board
from launch.label.desk import Desk
from launch.label.open import open_labelling
from launch.label.server import MAX_BODY, serving
from recipes.errors import Preempted, RequestError
from rlhf.feedback.judgements import Pair, as_lines
from tests.unit.launch.bench import Bench, Stages
from trainers.store.store import Store

EVIL = "<script>document.title = 'taken'</script><b>bold</b>"
FEEDBACK = """
  asked:
    kind: feedback
    of: base
    prompts: {source: jsonl, files: [prompts.jsonl]}
    annotators: [ann, bob]
    twice: 0.5
"""


def pairs_of(count: int) -> list[Pair]:
    return [Pair.of(f"question {n}", [f"good {n}", f"bad {n} {EVIL}"], f"prompts.jsonl:{n}") for n in range(count)]


@pytest.fixture
def desk(store: Store) -> Desk:
    """Four pairs of a stage of a run."""
    run = store.new_run("toy")
    desk = Desk(store, run.id, "asked", "f" * 64)
    entry = store.objects.put_chunks([as_lines(vars(pair) for pair in pairs_of(4))])
    desk.lay_out({"candidate": {"files": {"pairs.jsonl": entry.model_dump(mode="json")}, "metrics": {}}, "checks": []})
    return desk


def board_of(desk: Desk, *, twice: float = 0.5, labels: int | None = None) -> Board:
    return Board(desk, ["ann", "bob"], twice=twice, labels=labels)


def test_pairs_go_to_one_annotator_or_to_two_and_to_nobody_again(desk: Desk) -> None:
    board = board_of(desk)
    assert board.wanted == 6
    judged: dict[str, list[str]] = {"ann": [], "bob": []}
    for name in ["ann", "bob"] * 4:
        shown = board.next(name)
        if shown is not None:
            board.judge(name, shown.pair.id, "left")
            judged[name].append(shown.pair.id)
    assert all(len(set(own)) == len(own) for own in judged.values())
    assert sum(map(len, judged.values())) == board.count() == 6
    assert board.is_done()


def test_two_annotators_at_once_get_different_pairs_where_one_judge_suffices(desk: Desk) -> None:
    board = board_of(desk, twice=0)
    one, other = board.next("ann"), board.next("bob")
    assert one is not None
    assert other is not None
    assert one.pair.id != other.pair.id
    assert board.next("ann") == one  # the page was loaded again


def test_what_is_skipped_goes_to_another_and_what_is_flagged_to_nobody(desk: Desk) -> None:
    board = board_of(desk, twice=0)
    shown = board.next("ann")
    assert shown is not None
    board.judge("ann", shown.pair.id, "skip")
    seen = board.next("bob")
    assert seen is not None
    assert seen.pair.id == shown.pair.id
    board.judge("bob", shown.pair.id, "flag", "not a question")
    assert board.count() == 0
    assert all(found is not None and found.pair.id != shown.pair.id for found in map(board.next, ("ann", "bob")))


def test_undo_shows_the_pair_again_and_the_last_word_stands(desk: Desk) -> None:
    board = board_of(desk)
    shown = board.next("ann")
    assert shown is not None
    board.judge("ann", shown.pair.id, "left")
    assert board.undo("ann")
    assert board.count() == 0
    assert board.next("ann") == shown
    board.judge("ann", shown.pair.id, "tie", " both ")
    assert [(found.verdict, found.comment) for found in board.judgements()] == [("tie", "both")]
    assert not board_of(desk).undo("bob")


def test_another_page_and_a_later_one_know_every_judgement(desk: Desk) -> None:
    board, other = board_of(desk), board_of(desk)
    for choice in ("left", "right"):
        shown = board.next("ann")
        assert shown is not None
        board.judge("ann", shown.pair.id, choice)  # type: ignore[arg-type]
    other.refresh()
    assert other.judgements() == board.judgements() == board_of(desk).judgements()
    assert other.link("", "bob") == board.link("", "bob")


def test_the_left_answer_is_what_was_shown_on_the_left(desk: Desk) -> None:
    board = board_of(desk, twice=1.0)
    for name in ("ann", "bob"):
        while (shown := board.next(name)) is not None:
            board.judge(name, shown.pair.id, "left")
    assert {judgement.verdict for judgement in board.judgements()} == {"first", "second"}
    assert all(judgement.verdict == judgement.left for judgement in board.judgements())


@pytest.mark.parametrize(("pair", "choice", "comment"), [("?", "left", ""), ("", "best", ""), ("", "tie", "x" * 3000)])
def test_nonsense_is_refused(desk: Desk, pair: str, choice: Any, comment: str) -> None:
    board = board_of(desk)
    with pytest.raises(RequestError):
        board.judge("ann", pair or desk.pairs[0].id, choice, comment)
    assert board.count() == 0


def ask(url: str, body: bytes = b"{}", **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        data = error.read()
        return error.code, json.loads(data) if data.startswith(b"{") else {}


def test_the_page_answers_tokens_alone(desk: Desk) -> None:
    board = board_of(desk)
    ann = {"Authorization": f"Bearer {board.link('', 'ann').partition('#')[2]}"}
    with serving(board, "toy / asked", "127.0.0.1", 0) as address:
        found = ask(f"{address}/api/next", **ann)
        assert found[0] == 200
        assert found[1]["annotator"] == "ann"
        shown = found[1]["pair"]["id"]
        judged = json.dumps({"pair": shown, "choice": "tie"}).encode()
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer " + "0" * 32}):
            assert ask(f"{address}/api/judge", judged, **headers)[0] == 401
        assert ask(f"{address}/api/next", Host="evil.example", **ann)[0] == 400  # a name made to mean this machine
        assert ask(f"{address}/api/judge", b"[]", **ann)[0] == 400
        assert ask(f"{address}/api/judge", b" " * (MAX_BODY + 1), **ann)[0] == 400
        assert board.count() == 0
        assert ask(f"{address}/api/judge", judged, **ann)[1]["labels"] == board.count() == 1
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"question" not in page.read()
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.fixture
def asking(bench: Bench, recipe: Path, stages: Stages) -> Bench:
    """A run with a stage whose pairs people judge."""
    recipe.write_text(recipe.read_text() + FEEDBACK)
    (recipe.parent / "prompts.jsonl").write_text('{"prompt": "question"}\n')

    def answer(job: dict[str, Any], worker: Any) -> dict[str, Any]:
        if job["stage"] != "asked":
            return {}
        return {"files": {"pairs.jsonl": as_lines(vars(pair) for pair in pairs_of(4))}, "checks": []}

    stages.hook = answer
    return bench


def test_a_run_waits_stops_at_once_and_continues_with_every_label(asking: Bench, stages: Stages) -> None:
    record = asking.record(asking.resolve())
    ended: list[BaseException | object] = []

    def drive() -> None:
        try:
            ended.append(asking.drive(record=record)[1])
        except Preempted as error:
            ended.append(error)

    def board_when_there() -> Board:
        until = time.monotonic() + 60
        while True:
            try:
                return open_labelling(asking.store, f"{record.run}/asked")[1]
            except RequestError:
                assert time.monotonic() < until
                time.sleep(0.05)

    first = threading.Thread(target=drive)
    first.start()
    board = board_when_there()
    label(board, "ann", 2)
    record.request_stop()
    first.join(30)
    assert isinstance(ended[0], Preempted)

    again = threading.Thread(target=drive)
    again.start()
    board = board_when_there()
    assert board.count() == 2
    label(board, "ann", 2)
    label(board, "bob", 2)
    again.join(30)
    assert not again.is_alive()
    assert [job["stage"] for job in stages.jobs].count("asked") == 1
    made = ended[1].results["asked"].manifest  # type: ignore[union-attr]
    assert made.kind == "preferences"
    assert made.metrics["labels_by"] == {"ann": 4, "bob": 2}
    assert made.metrics["pairs_judged_twice"] == 2
    rows = asking.store.objects.get_bytes(made.files["preferences.jsonl"].sha256).splitlines()
    assert all(set(json.loads(row)["annotators"]) <= {"ann", "bob"} for row in rows)


def label(board: Board, annotator: str, count: int) -> None:
    """Prefer the answer that is good."""
    for _ in range(count):
        shown = board.next(annotator)
        assert shown is not None
        board.judge(annotator, shown.pair.id, "left" if shown.to_json()["left"].startswith("good") else "right")
