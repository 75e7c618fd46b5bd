"""Two annotators click through the page of a feedback stage in a real Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.label.board import Board
from launch.label.desk import Desk
from launch.label.server import serving
from rlhf.feedback.judgements import Judgement, Pair, as_lines, preference_set
from tests.chromium import CHROMIUM, DRIVER, MISSING, Browser, browsers
from trainers.store.store import Store

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)
EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title = 'taken'</script>"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {EVIL}?"}]


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """Three pairs, all judged by both annotators."""
    store = Store.open(str(tmp_path))
    desk = Desk(store, store.new_run("toy").id, "asked", "f" * 64)
    pairs = [Pair.of(CHAT if n == 1 else f"question {n}", [f"good {n} {EVIL}", f"bad {n}"]) for n in range(3)]
    entry = store.objects.put_chunks([as_lines(vars(pair) for pair in pairs)])
    desk.lay_out({"candidate": {"files": {"pairs.jsonl": entry.model_dump(mode="json")}, "metrics": {}}, "checks": []})
    return Board(desk, ["ann", "bob"], twice=1.0)


@pytest.fixture
def pages(board: Board) -> Iterator[tuple[Browser, Browser]]:
    """The page as each of the two sees it."""
    with serving(board, "toy / asked", "127.0.0.1", 0) as address, browsers(2) as (ann, bob):
        for name, page in (("ann", ann), ("bob", bob)):
            page.open(board.link(address, name))
            page.wait("!document.getElementById('work').hidden")
        yield ann, bob


def labels(page: Browser, own: int) -> None:
    """Wait until the page has heard of so many labels of its annotator."""
    page.wait(f"document.getElementById('count').textContent.includes(', {own} by')")


def last(board: Board, annotator: str) -> Judgement:
    return [found for found in board.judgements() if found.annotator == annotator][-1]


def good_key(page: Browser) -> str:
    return "1" if "good" in page.text("#left") else "2"


def test_two_annotators_judge_by_keys_and_by_clicks(board: Board, pages: tuple[Browser, Browser]) -> None:
    ann, bob = pages
    assert "#" not in ann.run("return location.href")
    for count in (1, 2, 3):
        assert EVIL in ann.text("#answers")  # shown as text, and not run
        ann.press(good_key(ann))
        labels(ann, count)
    assert "taken" not in ann.run("return document.title")
    assert "no pair" in ann.text("#message").lower()
    ann.press("u")
    labels(ann, 2)
    ann.press("c")
    ann.press("both say 1, u")  # typed into the comment, where keys mean letters
    ann.press("\ue00c")
    ann.press("3")
    labels(ann, 3)
    assert (last(board, "ann").verdict, last(board, "ann").comment) == ("tie", "both say 1, u")

    bob.click("#left" if "good" in bob.text("#left") else "#right")
    labels(bob, 1)
    bob.click("nav [data-choice=skip]")
    bob.wait("document.getElementById('prompt').textContent && document.getElementById('count').textContent")
    bob.wait("!document.getElementById('work').hidden")
    until_said(board, "bob", 2)
    bob.click("nav [data-choice=flag]")
    until_said(board, "bob", 3)
    assert [found.verdict for found in board.judgements() if found.annotator == "bob"][1:] == ["skip", "flag"]
    ann.open(ann.run("return location.origin + '/'"))  # reloaded: the tab remembers its token
    ann.wait("document.getElementById('message').textContent.includes('Thank you')")

    made = preference_set(board._desk.pairs, board.judgements())
    assert made.metrics["labels_by"] == {"ann": 3, "bob": 1}
    assert made.metrics["flagged"] == 1
    assert len(made.files["preferences.jsonl"].splitlines()) >= 1


def until_said(board: Board, annotator: str, count: int) -> None:
    """Wait until so many judgements of an annotator are kept."""
    import time

    until = time.monotonic() + 60
    while sum(found.annotator == annotator for found in board.judgements()) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_without_a_token_nothing_of_the_data_is_shown(board: Board) -> None:
    with serving(board, "toy / asked", "127.0.0.1", 0) as address, browsers(1) as (page,):
        page.open(address)
        page.wait("document.getElementById('message').className == 'error'")
        page.open(f"{address}/#{'0' * 32}")
        page.run("location.reload()")
        page.wait("document.getElementById('message').textContent.includes('not valid')")
        assert "question" not in page.text("body")
